"""`flexlora serve`: a federation of real clients, with all that it takes on the server's side."""

from __future__ import annotations

import fcntl
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Final

from flexlora.deployment.flower.superlink import Process, SuperLink, environment, free_port
from flexlora.deployment.keys import ServerKeys
from flexlora.deployment.server import server_run
from flexlora.deployment.server.registry import ARRIVALS
from flexlora.errors import FlexloraError, ProtocolError
from flexlora.federation import checkpoint
from flexlora.journal import Event, Record, events_after

NODES = "nodes"
"""Where among the server's keys the public keys of the nodes lie."""

_LOOK_SECONDS: Final = 0.3
_MOST_RESTARTS: Final = 20
_BEGIN_SECONDS: Final = 60.0
"""How long the run's process may take to begin before Flower is asked what became of it."""

_LOCK: Final = "serve.lock"


@dataclass(frozen=True)
class Listening:
    """Where clients reach the server; without ``keys`` it is insecure, and loopback alone.

    Raises:
        ProtocolError: an insecure server would listen on a network.
    """

    host: str
    port: int
    keys: Path | None

    def __post_init__(self) -> None:
        if self.keys is None and not is_loopback(self.host):
            raise ProtocolError(
                f"--insecure is for tests on one machine and listens on 127.0.0.1 alone, not on "
                f"{self.host}: make keys with `flexlora keys`, and serve with --keys."
            )


def is_loopback(host: str) -> bool:
    """Whether an address is this machine's own and no other's."""
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


@dataclass
class Server:
    """The processes of a served run: Flower's SuperLink on loopback, the gate before it."""

    folder: Path
    listening: Listening
    link: SuperLink = field(init=False)
    gate: Process | None = field(init=False)
    nodes: server_run.Nodes | None = field(init=False)
    restarts: int = field(default=0, init=False)
    run: str = field(default="", init=False)
    submitted: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        home, here = self.folder / "flower", self.listening
        keys = None if here.keys is None else ServerKeys.of(here.keys)
        # Without keys the clients, on this machine, reach the SuperLink itself.
        self.link = SuperLink(home, here.port if keys is None else free_port(), keys)
        self.gate = None if keys is None else _gate(home, here, self.link.url, keys)
        held = None if here.keys is None else here.keys / NODES
        self.nodes = None if held is None else server_run.Nodes(self.folder, held, self.link)

    def start(self) -> None:
        """Start both, let the known nodes in, and submit the run."""
        self.link.start()
        self.let_in()
        if self.gate is not None:
            self.gate.start()
        self._submit()

    def _submit(self) -> None:
        """Submit the run, which goes on from its last checkpoint, once nothing else writes on it.

        The journal is cut off here and not only there, so that nobody reads on in what the run
        is about to forget.
        """
        server_run.forget(self.folder)
        Record(self.folder).rewind(checkpoint.journal_bytes(self.folder))
        self.run, self.submitted = self.link.submit(self.folder), time.monotonic()

    def let_in(self) -> list[str]:
        """Let nodes in by the public keys that there are now, and no others; what is new."""
        return [] if self.nodes is None else self.nodes.look()

    def look(self) -> bool:
        """Start again what has ended; whether the run is resumed, from its last checkpoint.

        Raises:
            ProtocolError: it ends again and again.
        """
        if self.gate is not None and self.gate.ended is not None:
            self._once_more(self.gate)
            self.gate.start()
        if self.link.process.ended is not None:
            # With the SuperLink went the server's side of the run, which it had started.
            self._once_more(self.link.process)
            self.link.process.stop()
            self.link.start()
        elif self._has_died():
            self._once_more(self.link.process)
        else:
            return False
        self._submit()
        return True

    def _has_died(self) -> bool:
        """Whether the run's process is gone, without having said that it is over."""
        if server_run.has_begun(self.folder):
            gone = not server_run.is_alive(self.folder)
        else:
            late = time.monotonic() - self.submitted > _BEGIN_SECONDS
            gone = late and self.link.status(self.run).startswith("finished")
            self.submitted = time.monotonic() if late else self.submitted
        return gone and not any(Record(self.folder).events("finish", "stopped"))

    def _once_more(self, process: Process) -> None:
        self.restarts += 1
        if self.restarts > _MOST_RESTARTS:
            raise ProtocolError(
                f"The server's processes ended {self.restarts} times; the end of {process.log}:\n"
                f"{process.last_lines()}"
            )

    def stop(self) -> None:
        """End both."""
        try:
            if self.gate is not None:
                self.gate.stop()
        finally:
            self.link.process.stop()


def serve(folder: Path, listening: Listening) -> Iterator[Event]:
    """Run the federation that is laid out in ``folder``, yielding its journal as it grows.

    Raises:
        ProtocolError: the run stopped, with its reason; or Flower's processes cannot be had.
    """
    with _alone(folder):
        yield from _served(folder, listening)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the folder: a second server would end the processes of the first.

    Raises:
        ProtocolError: another one holds it.
    """
    with (folder / _LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ProtocolError(
                f"The run in {folder} is served already, by another process on this machine."
            ) from None
        yield


def _served(folder: Path, listening: Listening) -> Iterator[Event]:
    """See ``serve``."""
    arrivals, server = _Arrivals(folder / ARRIVALS), Server(folder, listening)
    try:
        server.start()
        place = checkpoint.journal_bytes(folder)
        while True:
            for event, after in events_after(Record(folder).path, place):
                place = after
                yield event
                if event["event"] == "finish":
                    return
                if event["event"] == "stopped":
                    raise ProtocolError(
                        f"The run stopped: {event['reason']} Go on with: flexlora serve --resume "
                        f"{folder}, and --listen and --keys as before."
                    )
            arrivals.say(_let_in(server))
            arrivals.show()
            if server.look():
                # The journal forgets what came after the checkpoint, and goes on from there.
                place = checkpoint.journal_bytes(folder)
            time.sleep(_LOOK_SECONDS)
    finally:
        server.stop()


def _let_in(server: Server) -> str:
    """Who may join now; or what is wrong with a key, which does not stop those that are in."""
    try:
        return "".join(f"{line}\n" for line in server.let_in())
    except FlexloraError as error:
        return f"no node is let in or put out: {error}\n"


@dataclass
class _Arrivals:
    """The lines that say who came, of which only new ones are shown."""

    path: Path
    place: int = 0
    said: str = ""

    def __post_init__(self) -> None:
        self.place = self.path.stat().st_size if self.path.exists() else 0

    def say(self, text: str) -> None:
        """Print a text, if it is not the last one again."""
        if text and text != self.said:
            print(text, end="", file=sys.stderr, flush=True)
            self.said = text

    def show(self) -> None:
        """Print what is new."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self.place)
            text = file.read()
        self.place += len(text)
        print(text.decode(errors="replace"), end="", file=sys.stderr, flush=True)


def _gate(home: Path, here: Listening, upstream: str, keys: ServerKeys) -> Process:
    arguments = [
        *(sys.executable, "-m", "flexlora.deployment.flower.gate"),
        *("--listen", f"{here.host}:{here.port}", "--upstream", upstream),
        *("--ca", str(keys.ca), "--cert", str(keys.certificate), "--key", str(keys.key)),
    ]
    return Process(arguments, home / "gate.log", environment(home))
