"""`flexlora serve`: starts and watches all processes of a federation on the server's side."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from flexlora import addresses
from flexlora.deployment.certificates import ServerKeys, make_internal
from flexlora.deployment.flower import local_users
from flexlora.deployment.flower.processes import Process, ProcessId, environment, free_port
from flexlora.deployment.flower.superlink import SuperLink
from flexlora.deployment.keys import NODES
from flexlora.deployment.server import delivery, server_run
from flexlora.deployment.server.admission import Admission
from flexlora.deployment.server.run_files import ARRIVALS
from flexlora.errors import ConfigError, FlexloraError, ProtocolError
from flexlora.federation import checkpoint
from flexlora.journal import Event, Record, events_after
from flexlora.storage import locked
from flexlora.storage.untrusted import printable_lines

_LOOK_SECONDS: Final = 0.3
_MOST_RESTARTS: Final = 20
_BEGIN_SECONDS: Final = 60.0
"""Time for the run's process to start, before the supervisor queries its state from Flower."""

_LOCK: Final = "serve.lock"
_INTERNAL: Final = "tls"
"""Folder of the certificate between the gate and the SuperLink, in Flower's folder of the run."""
_PID: Final = "serve.pid"


@dataclass(frozen=True)
class Listening:
    """Where clients reach the server; without ``keys`` it is insecure, and only on loopback.

    Raises:
        ProtocolError: an insecure server would listen on a network.
    """

    host: str
    port: int
    keys: Path | None

    def __post_init__(self) -> None:
        if self.keys is None and not addresses.is_loopback(self.host):
            raise ProtocolError(
                f"--insecure disables TLS and client keys and listens only on 127.0.0.1, not on "
                f"{self.host}: make keys with `flexlora keys`, and serve with --keys."
            )

    @property
    def address(self) -> str:
        """HOST:PORT."""
        return addresses.joined(self.host, self.port)

    def check_free(self) -> None:
        """Check that no other program listens at the address.

        Raises:
            ConfigError: one does, or the address is not this machine's.
        """
        try:
            addresses.listener(self.host, self.port).close()
        except OSError as error:
            # Python appends the address to the system's words.
            reason = (error.strerror or str(error)).partition(" (while")[0]
            raise ConfigError(
                f"The server cannot listen on {self.address}: {reason}. Stop the program that uses "
                "it, or give another address with --listen HOST:PORT."
            ) from error


@dataclass
class Server:
    """The processes of a served run: Flower's SuperLink on loopback, and the gate before it."""

    folder: Path
    listening: Listening
    link: SuperLink = field(init=False)
    gate: Process | None = field(init=False)
    admission: Admission | None = field(init=False)
    restarts: int = field(default=0, init=False)
    run: str = field(default="", init=False)
    submitted: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        home, listening = self.folder / "flower", self.listening
        keys = None if listening.keys is None else ServerKeys.of(listening.keys)
        # The server's own certificate may be renewed, or expire, while the run goes on.
        internal = None if keys is None else make_internal(home / _INTERNAL)
        # Without keys the clients, on this machine, connect to the SuperLink itself.
        self.link = SuperLink(home, listening.port if keys is None else free_port(), internal)
        self.gate = None if keys is None else _gate(self.folder, listening, self.link, keys)
        self.admission = (
            None
            if listening.keys is None
            else Admission(self.folder, listening.keys / NODES, self.link)
        )

    def check_free(self) -> None:
        """Check that the address is free, once what a killed server left behind has ended.

        Raises:
            ConfigError: another program listens there, or it is no address of this machine.
        """
        for process in (self.gate, self.link.process):
            if process is not None:
                process.end_left_behind()
        self.listening.check_free()

    def start(self) -> None:
        """Start both, authorise the nodes with keys, and submit the run."""
        self.link.start()
        self.update_nodes()
        if self.gate is not None:
            self.gate.start()
        self._submit()

    def _submit(self) -> None:
        """Submit the run, which resumes from its last checkpoint; nothing else writes on it now.

        The journal is cut back here and not only by the run, so that nobody reads on in events
        that the run is about to discard.
        """
        server_run.end_process(self.folder)
        if not self.is_finished:
            server_run.cut_back(self.folder)
        self.run, self.submitted = self.link.submit(self.folder), time.monotonic()

    @property
    def is_finished(self) -> bool:
        """Whether the run has all its rounds, and the server only delivers the adapter."""
        return server_run.finish_of(self.folder) is not None

    def update_nodes(self) -> list[str]:
        """Authorise and revoke nodes by their public keys; returns a line on each change."""
        return [] if self.admission is None else self.admission.update()

    def restart_ended(self) -> bool:
        """Restart what has ended; returns whether the run was resumed from its last checkpoint.

        Raises:
            ProtocolError: it has ended too often.
        """
        if self.gate is not None and self.gate.ended is not None:
            self._count_restart(self.gate)
            self.gate.start()
        if self.link.process.ended is not None:
            # The server's side of the run, which the SuperLink had started, ended with it.
            self._count_restart(self.link.process)
            self.link.process.stop()
            self.link.start()
        elif self._run_died():
            self._count_restart(self.link.process)
        else:
            return False
        self._submit()
        return True

    def _run_died(self) -> bool:
        """Whether the run's process has ended without an event that says so."""
        if server_run.has_begun(self.folder):
            ended = not server_run.is_alive(self.folder)
        else:
            late = time.monotonic() - self.submitted > _BEGIN_SECONDS
            ended = late and self.link.status(self.run).startswith("finished")
            self.submitted = time.monotonic() if late else self.submitted
        if not ended or delivery.is_closed(self.folder):
            return False
        return not any(Record(self.folder).events("stopped"))

    def _count_restart(self, process: Process) -> None:
        self.restarts += 1
        if self.restarts > _MOST_RESTARTS:
            raise ProtocolError(
                f"The server's processes ended {self.restarts} times; the end of {process.log}:\n"
                f"{process.last_lines()}"
            )

    def stop(self) -> None:
        """End both, and the process of the rounds, which may be waiting for an upload."""
        try:
            if self.gate is not None:
                self.gate.stop()
        finally:
            self.link.process.stop()
            server_run.end_process(self.folder)


def serve(folder: Path, listening: Listening, stay_seconds: float) -> Iterator[Event]:
    """Run the federation that is prepared in ``folder``, yielding its journal as it grows.

    After the last round it stays up until every client has the finished adapter, at most for
    ``stay_seconds``. Of a run that is finished already there is only that to do.

    Raises:
        ProtocolError: the run stopped, with its reason; Flower's processes cannot be started; or
            the run is being served already.
    """
    # A second server would end the processes of the first.
    with locked(folder, _LOCK, _refusal(folder)):
        ProcessId.of(os.getpid()).write(folder / _PID)
        try:
            yield from _served(folder, listening, stay_seconds)
        finally:
            (folder / _PID).unlink(missing_ok=True)


def _refusal(folder: Path) -> str:
    identity = ProcessId.read(folder / _PID)
    if identity is None or identity.running is None:
        by, remedy = "another process on this machine", "stop that process first"
    else:
        by = f"process {identity.pid} on this machine"
        remedy = f"stop it first: kill -INT {identity.pid}"
    return f"The run in {folder} is served already, by {by}; {remedy}."


def _served(folder: Path, listening: Listening, stay_seconds: float) -> Iterator[Event]:
    """See ``serve``."""
    console, server = _ConsoleLines(folder / ARRIVALS), Server(folder, listening)
    journal, finished_at, offset_bytes = Record(folder).path, None, None
    server.check_free()
    for sentence in local_users.unguarded(local_users.SERVER):
        console.print_change(f"note: {sentence}\n")
    if server.is_finished:
        delivery.reopen(folder)
        finished_at = time.monotonic()
    else:
        delivery.forget(folder)
        server_run.cut_back(folder)
        offset_bytes = checkpoint.journal_bytes(folder)
    try:
        server.start()
        while True:
            # Closed before the lines on the last clients are read.
            is_over = finished_at is not None and (
                delivery.is_closed(folder) or time.monotonic() - finished_at > stay_seconds
            )
            news = iter(()) if offset_bytes is None else events_after(journal, offset_bytes)
            events = list(news)
            # Read after the events, so that a client's line comes before those that follow from it.
            console.print_change(_update_nodes(server))
            console.print_new()
            for event, offset_bytes in events:
                yield event
                if event["event"] == "stopped":
                    raise _stopped(folder, event)
                if event["event"] == "finish":
                    finished_at, offset_bytes = time.monotonic(), None
                    break
            if is_over:
                return
            if server.restart_ended() and offset_bytes is not None:
                # The journal was cut back to the checkpoint.
                offset_bytes = checkpoint.journal_bytes(folder)
            time.sleep(_LOOK_SECONDS)
    finally:
        server.stop()


def _stopped(folder: Path, event: Event) -> ProtocolError:
    """What the user reads of a run that stopped with an error."""
    return ProtocolError(
        f"The run stopped: {event['reason']} Resume it with: flexlora serve --resume {folder}, and "
        "--listen and --keys as before."
    )


def _update_nodes(server: Server) -> str:
    """The changes of authorised nodes, or an invalid key, which does not stop other nodes."""
    try:
        return "".join(f"{line}\n" for line in server.update_nodes())
    except FlexloraError as error:
        return f"the authorised nodes are unchanged: {error}\n"


@dataclass
class _ConsoleLines:
    """Prints what is new in a file of sentences on clients."""

    path: Path
    offset_bytes: int = 0
    last_change: str = ""

    def __post_init__(self) -> None:
        self.offset_bytes = self.path.stat().st_size if self.path.exists() else 0

    def print_change(self, text: str) -> None:
        """Print a text, unless it repeats the last one."""
        if text and text != self.last_change:
            print(printable_lines(text), end="", file=sys.stderr, flush=True)
            self.last_change = text

    def print_new(self) -> None:
        """Print what was appended to the file."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self.offset_bytes)
            text = file.read()
        self.offset_bytes += len(text)
        lines = printable_lines(text.decode(errors="replace"))
        print(lines, end="", file=sys.stderr, flush=True)


def _gate(folder: Path, listening: Listening, link: SuperLink, keys: ServerKeys) -> Process:
    home = folder / "flower"
    arguments = [
        *(sys.executable, "-m", "flexlora.deployment.flower.gate"),
        *("--listen", listening.address, "--upstream", link.url),
        *("--ca", str(keys.ca), "--cert", str(keys.certificate), "--key", str(keys.key)),
        *("--upstream-ca", str(home / _INTERNAL / "ca.crt")),
        *("--run", str(folder.resolve())),
    ]
    return Process(arguments, home / "gate.log", environment(home))
