"""Atomic writes, and locks between the processes of one machine."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from flexlora.errors import ProtocolError

LOCK = ".lock"
"""The default name of a folder's lock file; the file stays when the lock is released."""


def write_atomically(path: Path, data: bytes, mode: int = 0o666) -> None:
    """Write a file so that a crash leaves the old content or the new one, never a part.

    The bytes go to a draft beside ``path`` and to the disk (fsync); the draft is then renamed.
    ``mode`` is the permission of a new file, before the umask.

    Raises:
        OSError: the disk is full or the folder cannot be written; the draft is removed.
    """
    draft = path.with_name(f".{path.name}.partial")
    try:
        # An older draft may have other permissions.
        draft.unlink(missing_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        with os.fdopen(os.open(draft, flags, mode), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)  # after a full disk, half a file would stay for good
        raise


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def locked(
    folder: Path, name: str = LOCK, refusal: str | None = None, seconds: float = 0.0
) -> Iterator[None]:
    """Keep other processes out of ``folder`` until the end of the block.

    The operating system releases the lock when this process ends, however it ends. A folder
    that does not exist is not created, and nothing is locked. ``refusal`` replaces the sentence
    of the error; ``seconds`` is how long to wait for a lock that another process has.

    Raises:
        ProtocolError: another process has the lock.
    """
    if not folder.is_dir():
        yield
        return
    lock = _lock(folder / name)
    try:
        lock.acquire(timeout=seconds)
    except Timeout as error:
        sentence = f"Another process runs in {folder}; let it end, or give another folder."
        raise ProtocolError(refusal or sentence) from error
    try:
        yield
    finally:
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


def _lock(path: Path) -> FileLock:
    # A generator that runs in one thread may be closed in another.
    return FileLock(path, thread_local=False)
