"""Flower's own processes: started, watched and stopped, without network but the federation's."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

from flexlora.deployment.keys import NodeKey, ServerKeys
from flexlora.errors import FlexloraError, ProtocolError

_STOP_SECONDS: Final = 10.0
_START_SECONDS: Final = 60.0
_CONNECTION: Final = "run"
"""What Flower's own config calls the SuperLink of this run."""
_POLL: Final = "FLWR_SUPEREXEC_TASK_POLL_INTERVAL"
_MEMORY: Final = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(2**26),
    "MALLOC_TRIM_THRESHOLD_": str(2**28),
}
"""For the C library of Linux: chunks of 5 MiB come and go, and to have the system clear their pages
each time takes longer than to fill them. A process keeps up to 256 MiB that it does not use."""
_DATABASE: Final = "state.db"
_PAGE_BYTES: Final = 65536
"""Of the database: payloads lie there in chunks of megabytes. Flower's own pages, of 4096, take
three times as long to write and twice as long to delete."""
_IN_USE: Final = "already in use"
"""Flower's words about a public key that it has."""
_LOG: Final = "FLEXLORA_LOG"
"""In the environment of a process and of all that it starts: whose they are."""


def environment(home: Path) -> dict[str, str]:
    """The environment for Flower: its files in ``home``, no telemetry, nothing installed.

    None of Flower's own settings is inherited: some open further ports, past the gate.
    """
    programs = str(Path(sys.executable).parent)
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("FLWR_")}
    return {
        **inherited,
        "PATH": os.pathsep.join([programs, os.environ.get("PATH", "")]),
        "FLWR_HOME": str(home.resolve()),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        **_MEMORY,
        _POLL: "0.2",
    }


def program(name: str) -> str:
    """One of Flower's programs, beside this Python.

    Raises:
        ProtocolError: Flower is not installed.
    """
    path = Path(sys.executable).parent / name
    if not path.exists():
        raise ProtocolError(
            f"Flower's program {name} is missing; install it with: pip install 'flexlora[flower]'."
        )
    return str(path)


def free_port() -> int:
    """A port of the loopback that nobody listens on now."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Ignore Ctrl-C and SIGTERM for a while: half a stop would leave processes behind."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread is interrupted
        return
    both = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, signal.SIG_IGN) for number in both]
    try:
        yield
    finally:
        for number, handler in zip(both, before, strict=True):
            signal.signal(number, handler)


@dataclass
class Process:
    """A program with all that it starts, and its log; restarted by whoever watches it."""

    arguments: Sequence[str]
    log: Path
    env: Mapping[str, str]
    _held: subprocess.Popen[bytes] | None = field(default=None, init=False)

    @property
    def _mark(self) -> str:
        return str(self.log.resolve())

    @property
    def _number(self) -> Path:
        return self.log.with_suffix(".pid")

    def start(self) -> None:
        """Start it, in a group of its own, once one that a crash left behind is ended."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self._end_left_behind()
        with self.log.open("ab") as log:
            self._held = subprocess.Popen(
                list(self.arguments),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**self.env, _LOG: self._mark},
                start_new_session=True,
            )
        self._number.write_text(str(self._held.pid))

    def _end_left_behind(self) -> None:
        """End the group of an earlier start, if whoever started it was killed."""
        if not self._number.exists():
            return
        group = self._number.read_text()
        # The number may be another program's by now, above all after a reboot.
        listed = subprocess.run(
            ["ps", "-A", "-ww", "-o", "pgid=,pid=,args="],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.splitlines()
        held = [line.split(None, 2) for line in listed]
        mine = [pid for of, pid, *args in held if of == group and self._is_mine(pid, "".join(args))]
        if group.isdecimal() and mine:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(int(group), signal.SIGKILL)
        self._number.unlink()

    def _is_mine(self, pid: str, args: str) -> bool:
        """Whether a process is of an earlier start: by its environment; without /proc, its name."""
        if not Path("/proc/self/environ").exists():
            return Path(self.arguments[0]).name in args
        try:
            held = Path(f"/proc/{pid}/environ").read_bytes()
        except OSError:  # it has ended, or is another user's
            return False
        return os.fsencode(f"{_LOG}={self._mark}") in held.split(b"\0")

    @property
    def ended(self) -> int | None:
        """Its exit code; None while it runs."""
        return None if self._held is None else self._held.poll()

    def stop(self) -> None:
        """End it and all of its group, also if this process is told meanwhile to hurry."""
        if self._held is None:
            return
        with _undisturbed():
            self._stop(self._held)

    def _stop(self, held: subprocess.Popen[bytes]) -> None:
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(held.pid, signal.SIGTERM)
            held.wait(_STOP_SECONDS)
        with contextlib.suppress(ProcessLookupError):  # what it started may outlive it
            os.killpg(held.pid, signal.SIGKILL)
        held.wait()
        self._number.unlink(missing_ok=True)

    def last_lines(self, count: int = 15) -> str:
        """The end of its log, for an error."""
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        return "\n".join(text.splitlines()[-count:])


@dataclass
class SuperLink:
    """A SuperLink on loopback, of one run, with its state on the disk of the run's folder."""

    home: Path
    port: int
    tls: ServerKeys | None
    process: Process = field(init=False)

    def __post_init__(self) -> None:
        self.home.mkdir(parents=True, exist_ok=True)
        secure = (
            ["--insecure"]
            if self.tls is None
            else [
                *("--ssl-ca-certfile", str(self.tls.ca)),
                *("--ssl-certfile", str(self.tls.certificate)),
                *("--ssl-keyfile", str(self.tls.key)),
                "--enable-supernode-auth",
            ]
        )
        arguments = [
            *(program("flower-superlink"), "--host", "127.0.0.1", "--port", str(self.port)),
            *("--database", str(self.home / _DATABASE), *secure),
            "--disable-runtime-dependency-installation",
        ]
        log = self.home / "superlink.log"
        env = environment(self.home) | {_POLL: "1.0"}  # it starts the run, and nothing else
        self.process = Process(arguments, log, env)
        self._write_connection()
        self._make_database()

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"{'http' if self.tls is None else 'https'}://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it and wait until it answers.

        Raises:
            ProtocolError: it does not.
        """
        self.process.start()
        until = time.monotonic() + _START_SECONDS
        while time.monotonic() < until and self.process.ended is None:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.2)
        self.process.stop()
        raise ProtocolError(
            f"Flower's SuperLink did not start on port {self.port}; the end of its log "
            f"{self.process.log}:\n{self.process.last_lines()}"
        )

    def register(self, public_key: Path, name: str) -> int:
        """Let the node of this key in, under this name; Flower's number for it."""
        said = self._flwr("supernode", "register", str(public_key), _CONNECTION, "--name", name)
        return int(said["node-id"])

    def number(self, public_key: Path, name: str, known: Collection[int]) -> int:
        """Flower's number for a node, registered now or before; none of those ``known``.

        A server that was killed may have registered a node and not have written it down. Flower
        says of no node which key it has, but it is the one that is not known.
        """
        try:
            return self.register(public_key, name)
        except FlexloraError as error:
            left = self._registered() - set(known) if _IN_USE in str(error) else set()
            if len(left) != 1:
                raise
            return left.pop()

    def unregister(self, node: int) -> None:
        """End a node's right to take part, also if it is connected; it may have none any more."""
        if node in self._registered():
            self._flwr("supernode", "unregister", str(node), _CONNECTION)

    def _registered(self) -> set[int]:
        """Flower's numbers of the nodes that may take part."""
        listed = self._flwr("supernode", "list", _CONNECTION)["nodes"]
        return {int(node["node-id"]) for node in listed if node["status"] != "unregistered"}

    def submit(self, folder: Path) -> str:
        """Start the run that is laid out in ``folder``; Flower's number for it."""
        app = self.home / "app"
        shutil.rmtree(app, ignore_errors=True)
        # Only what nodes are to have: no caches.
        shutil.copytree(
            str(files("flexlora.deployment.flower") / "app"),
            app,
            ignore=shutil.ignore_patterns("__pycache__"),
        )
        # A TOML string in JSON's spelling: both escape alike.
        where = f"folder={json.dumps(str(folder.resolve()))}"
        said = self._flwr("run", str(app), _CONNECTION, "--run-config", where)
        return str(said["run-id"])

    def status(self, run: str) -> str:
        """How a run stands: "running", "finished:completed", "finished:failed", ..."""
        said = self._flwr("ls", _CONNECTION, "--run-id", run)
        return str(said["runs"][0]["status"])

    def _flwr(self, *arguments: str) -> dict[str, Any]:
        """What Flower's command line answers, in JSON.

        Raises:
            ProtocolError: it fails.
        """
        done = subprocess.run(
            [program("flwr"), *arguments, "--format", "json"],
            capture_output=True,
            text=True,
            env=environment(self.home),
            stdin=subprocess.DEVNULL,
            timeout=_START_SECONDS,
            check=False,
        )
        # Notes may stand before the JSON.
        start = done.stdout.find("{")
        try:
            said: dict[str, Any] = json.loads(done.stdout[start:])
        except ValueError:
            said = {}
        if done.returncode or not said.get("success"):
            raise ProtocolError(
                f"Flower refused `flwr {' '.join(arguments[:2])}`: "
                f"{said.get('error-message') or (done.stdout + done.stderr).strip()[-800:]}"
            )
        return said

    def _make_database(self) -> None:
        """An empty database, where there is none: the size of its pages is decided for good."""
        file = self.home / _DATABASE
        if file.exists() and file.stat().st_size:
            return
        with contextlib.closing(sqlite3.connect(file)) as made:
            made.execute(f"PRAGMA page_size = {_PAGE_BYTES}")
            made.execute("VACUUM")

    def _write_connection(self) -> None:
        """Tell Flower's command line where the SuperLink is."""
        trust = (
            "insecure = true"
            if self.tls is None
            else f"root-certificates = {json.dumps(str(self.tls.ca.resolve()))}"
        )
        (self.home / "config.toml").write_text(
            f'[superlink]\ndefault = "{_CONNECTION}"\n\n[superlink.{_CONNECTION}]\n'
            f'address = "127.0.0.1:{self.port}"\n{trust}\n'
        )


def supernode(address: str, home: Path, worker: Path, keys: NodeKey | None) -> Process:
    """A SuperNode that passes messages on to a worker; insecure without keys."""
    secure = (
        ["--insecure"]
        if keys is None
        else ["--root-certificates", str(keys.ca), "--auth-supernode-private-key", str(keys.key)]
    )
    programs = home / "programs"
    programs.mkdir(parents=True, exist_ok=True)
    _write_program(programs / "flwr-clientapp", "flexlora.deployment.flower.pull_backoff")
    env = environment(home)
    env["PATH"] = os.pathsep.join([str(programs.resolve()), env["PATH"]])
    arguments = [
        *(program("flower-supernode"), "--superlink", address, *secure),
        *("--port", str(free_port()), "--node-config", f'worker="{worker}"'),
    ]
    return Process(arguments, home / "supernode.log", env)


def _write_program(path: Path, module: str) -> None:
    """A program that runs a module, by this Python, and takes none from where it is started."""
    draft = path.with_name(f".{path.name}.partial")
    draft.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -P -m {module} "$@"\n')
    draft.chmod(0o700)
    draft.replace(path)
