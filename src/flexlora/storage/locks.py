"""Locks on folders between the processes of one machine."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from filelock import FileLock, Timeout

from flexlora.errors import ProtocolError
from flexlora.storage.files import write_atomically

LOCK: Final = ".lock"
"""The default name of a folder's lock file; the file stays when the lock is released."""

_HOLDER: Final = ".holder"
"""What follows the name of a lock file in the name of the file that says who has the lock."""


@contextmanager
def locked(
    folder: Path, name: str = LOCK, refusal: str | None = None, seconds: float = 0.0
) -> Iterator[None]:
    """Keep other processes out of ``folder`` until the end of the block.

    The operating system releases the lock when this process ends, however it ends. A folder
    that does not exist is not created, and nothing is locked. ``refusal`` replaces the sentence
    of the error; ``seconds`` is how long to wait for a lock that another process has.

    Raises:
        ProtocolError: another process has the lock; names the process, and how to end it.
    """
    if not folder.is_dir():
        yield
        return
    path = folder / name
    lock = _lock(path)
    try:
        lock.acquire(timeout=seconds)
    except Timeout as error:
        sentence = f"Another process runs in {folder}; let it end, or give another folder."
        raise ProtocolError(f"{refusal or sentence}{_of_holder(path)}") from error
    try:
        _write_holder(path)
        yield
    finally:
        with suppress(OSError):
            _holder(path).unlink(missing_ok=True)
        lock.release()


def is_locked(path: Path) -> bool:
    """Whether a process has the lock of the lock file ``path``; False if there is no file."""
    if not path.exists():
        return False
    lock = _lock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    lock.release()
    return False


def is_lock_file(path: Path) -> bool:
    """Whether a file is a lock file, or says who has one."""
    return path.suffix in (LOCK, _HOLDER) or path.name == LOCK


def _lock(path: Path) -> FileLock:
    # A generator that runs in one thread may be closed in another.
    return FileLock(path, mode=0o600, thread_local=False)


def _holder(path: Path) -> Path:
    name = path.name.removeprefix(".")
    return path.with_name(f".{name}{_HOLDER}")


def _write_holder(path: Path) -> None:
    """Say who has the lock, for people; the lock itself is the system's."""
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]) if sys.argv else "python"
    content = {"pid": os.getpid(), "command": command[:300]}
    with suppress(OSError):  # a full disk: then nobody can say who it is
        write_atomically(_holder(path), json.dumps(content).encode())


def _of_holder(path: Path) -> str:
    """A sentence on the process that has a lock; empty if that is not known."""
    try:
        content = json.loads(_holder(path).read_text(encoding="utf-8"))
        pid, command = int(content["pid"]), str(content["command"])
        os.kill(pid, 0)
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return ""  # of a process that was killed: the one that has the lock has just begun
    shown = "".join(c if c.isprintable() else "?" for c in command)
    return f" It is process {pid} ({shown}); end it with: kill {pid}"
