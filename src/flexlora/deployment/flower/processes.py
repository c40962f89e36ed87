"""Programs that the server and the nodes start: watched, restarted, and ended with their group."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from flexlora.errors import ProtocolError
from flexlora.storage import make_private, write_atomically

try:
    import psutil
except ImportError as error:
    raise ProtocolError(
        "Real clients need the package 'psutil'; install it with: pip install 'flexlora[flower]'."
    ) from error

POLL_INTERVAL: Final = "FLWR_SUPEREXEC_TASK_POLL_INTERVAL"
_STOP_SECONDS: Final = 10.0
_MEMORY: Final = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(2**26),
    "MALLOC_TRIM_THRESHOLD_": str(2**28),
}
"""Settings of the C library of Linux. Payload chunks of 5 MiB are allocated and freed all the time;
having the system clear their pages each time takes longer than filling them. A process keeps up to
256 MiB that it does not use."""
_APPEND: Final = os.O_WRONLY | os.O_CREAT | os.O_APPEND
_LOG: Final = "FLEXLORA_LOG"
"""Environment variable of a program and of all that it starts: the path of its log."""
_SAME_TIME_SECONDS: Final = 1.0
"""The system's clock may be set between two readings of a process's start time."""


def environment(home: Path) -> dict[str, str]:
    """The environment for Flower: its files in ``home``, no telemetry, no installation.

    None of Flower's own settings is inherited: some open further ports, which the gate does not
    protect.
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
        POLL_INTERVAL: "0.2",
    }


def program(name: str) -> str:
    """The path of one of Flower's programs, beside this Python.

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
    """A port of 127.0.0.1 on which nothing listens now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
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


@dataclass(frozen=True)
class ProcessId:
    """A process: its number, and its start time in seconds since the epoch.

    The system gives the number to another process later, above all after a reboot; number and
    start time together are unique. The file of an earlier version has no start time.
    """

    pid: int
    created: float | None

    @classmethod
    def of(cls, pid: int) -> ProcessId:
        """The identity of a running process. Raises psutil.NoSuchProcess if there is none."""
        return cls(pid, psutil.Process(pid).create_time())

    @classmethod
    def read(cls, path: Path) -> ProcessId | None:
        """The identity in a file; None if there is no file, or no identity in it."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(content, int):
                return cls(content, None)
            return cls(int(content["pid"]), float(content["created"]))
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None

    def write(self, path: Path) -> None:
        """Write the identity for ``read``."""
        content = {"pid": self.pid, "created": self.created}
        write_atomically(path, json.dumps(content).encode())

    @property
    def running(self) -> psutil.Process | None:
        """The process, if it runs still."""
        try:
            process = psutil.Process(self.pid)
        except psutil.Error:
            return None
        return process if self.is_of(process) and _runs(process) else None

    def is_of(self, process: psutil.Process) -> bool:
        """Whether this is the identity of a running process."""
        if self.created is None or process.pid != self.pid:
            return False
        try:
            created: float = process.create_time()
        except psutil.Error:  # it has ended
            return False
        return abs(created - self.created) <= _SAME_TIME_SECONDS


def _log_of(process: psutil.Process) -> str | None:
    """The log with which a process was started, "" for none; None if that cannot be read."""
    try:
        variables: dict[str, str] = process.environ()
    except (psutil.Error, OSError):  # it has ended, or is another user's
        return None
    return variables.get(_LOG, "")


def _runs(process: psutil.Process) -> bool:
    """Whether a process has not ended; it is not waited for, as a parent does."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def end(processes: Sequence[psutil.Process], politely: bool = True) -> None:
    """End processes other than this one: SIGTERM, and ten seconds later SIGKILL, or that at once.

    One that waits for a server that is gone does not end on a SIGTERM, which Flower catches.
    Ctrl-C and SIGTERM do not interrupt this.
    """
    others = [process for process in processes if process.pid != os.getpid()]
    signals = (psutil.Process.terminate, psutil.Process.kill)
    with _uninterrupted():
        for send in signals if politely else signals[1:]:
            for process in others:
                with contextlib.suppress(psutil.Error):  # psutil compares the start time again
                    send(process)
            until = time.monotonic() + _STOP_SECONDS
            while any(map(_runs, others)) and time.monotonic() < until:
                time.sleep(0.02)


@dataclass
class Process:
    """A program with all that it starts, its log, and a file that identifies it.

    The caller watches ``ended`` and restarts it.
    """

    arguments: Sequence[str]
    log: Path
    env: Mapping[str, str]
    _running: subprocess.Popen[bytes] | None = field(default=None, init=False)

    @property
    def id_file(self) -> Path:
        """The file with the identity of the running program."""
        return self.log.with_suffix(".pid")

    def start(self) -> None:
        """Start it in a process group of its own, after ending one that a crash left behind."""
        make_private(self.log.parent)
        self.end_left_behind()
        with os.fdopen(os.open(self.log, _APPEND, 0o600), "ab") as log:
            self._running = subprocess.Popen(
                list(self.arguments),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**self.env, _LOG: str(self.log.resolve())},
                start_new_session=True,
                umask=0o077,
            )
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended already
            ProcessId.of(self._running.pid).write(self.id_file)

    def end_left_behind(self) -> None:
        """End what an earlier start left behind, if the process that started it was killed.

        Once this returns, their ports are free.
        """
        end(self._family(), politely=False)
        self.id_file.unlink(missing_ok=True)

    def _family(self) -> list[psutil.Process]:
        """The program and all that it started, now or earlier, in whatever session they are.

        These are the processes with this log in their environment. Of processes whose environment
        cannot be read, only that with the number and the start time in the file: after a reboot
        the number may belong to another program.
        """
        earlier, log, family = ProcessId.read(self.id_file), str(self.log.resolve()), []
        for process in psutil.process_iter():
            started_with = _log_of(process)
            unreadable = started_with is None and earlier is not None and earlier.is_of(process)
            if started_with == log or unreadable:
                family.append(process)
        return family

    @property
    def ended(self) -> int | None:
        """Its exit code; None while it runs."""
        return None if self._running is None else self._running.poll()

    def stop(self) -> None:
        """End it and all that it started; Ctrl-C and SIGTERM do not interrupt this."""
        if self._running is None:
            return
        with _uninterrupted():
            self._stop(self._running)

    def _stop(self, running: subprocess.Popen[bytes]) -> None:
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(running.pid, signal.SIGTERM)
            running.wait(_STOP_SECONDS)
        with contextlib.suppress(ProcessLookupError):  # what it started may outlive it
            os.killpg(running.pid, signal.SIGKILL)
        running.wait()
        # Flower starts the process of the rounds in a session of its own.
        end(self._family())
        self.id_file.unlink(missing_ok=True)

    def last_lines(self, count: int = 15) -> str:
        """The end of its log, for an error."""
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        return "\n".join(text.splitlines()[-count:])
