"""Files that are whole or not there, for their owner alone unless they are to be published."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Final

PUBLISHED: Final = 0o666
"""The permission, before the umask, of what is meant for others: adapters, reports."""

_PRIVATE: Final = 0o600
_PRIVATE_FOLDER: Final = 0o700


def write_atomically(path: Path, data: bytes, mode: int = _PRIVATE) -> None:
    """Write a file so that a crash leaves the old content or the new one, never a part.

    The bytes go to a draft beside ``path`` and to the disk (fsync); the draft is then renamed.
    ``mode`` is the permission of the file, before the umask; by default its owner's alone.

    Raises:
        OSError: the disk is full or the folder cannot be written; names ``path``. The draft is
            removed.
    """
    with replacing(path, mode) as file:
        file.write(data)


@contextmanager
def replacing(path: Path, mode: int = _PRIVATE) -> Iterator[IO[bytes]]:
    """A file to write to, which becomes ``path`` at the end of the block; see `write_atomically`.

    Several processes may write the same file: each has a draft of its own.
    """
    # Not named after the file, whose name may be as long as names can be.
    draft = path.with_name(f".{secrets.token_hex(6)}.partial")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    try:
        with os.fdopen(os.open(draft, flags, mode), "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except BaseException as error:
        # After a full disk, half a file would stay for good.
        with suppress(OSError):
            draft.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno:
            # Errors of writing name no file, those of the draft one that nobody knows.
            error.filename, error.filename2 = os.fspath(path), None
        raise


def write_new(path: Path, data: bytes | memoryview) -> None:
    """Write a file that need not outlast this process, in place of the one that is there.

    That one is not written over: its pages may still be mapped. Raises OSError that names it.
    """
    try:
        path.unlink(missing_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        with os.fdopen(os.open(path, flags, _PRIVATE), "wb") as file:
            file.write(data)
    except OSError as error:
        if error.errno:
            error.filename = os.fspath(path)
        raise


def remove_drafts(folder: Path) -> None:
    """Remove what writers that were killed have left in a folder; nobody may write in it now."""
    for draft in folder.glob(".*.partial"):
        if draft.is_file():
            draft.unlink(missing_ok=True)
    for draft in folder.glob(".partial-*"):  # of a cache of tokens
        if draft.is_dir():
            shutil.rmtree(draft)


def append(path: Path, data: bytes) -> None:
    """Add bytes to the end of a file and make sure that they are on the disk.

    Raises:
        OSError: the disk is full; what was written of the bytes is removed again if it can be.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0)
    try:
        with os.fdopen(os.open(path, flags, _PRIVATE), "wb", buffering=0) as file:
            before = os.fstat(file.fileno()).st_size
            try:
                left = memoryview(data)
                while left:
                    left = left[file.write(left) :]
                os.fsync(file.fileno())
            except OSError:
                with suppress(OSError):
                    file.truncate(before)
                raise
    except OSError as error:
        if error.errno:
            error.filename = os.fspath(path)
        raise


def make_private(folder: Path) -> None:
    """Make a folder that only its owner can enter, unless it exists, and the folders above it.

    Whatever the umask; a folder that exists keeps its permissions.
    """
    if folder.is_dir():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=_PRIVATE_FOLDER, exist_ok=True)


def close_to_others(folder: Path) -> None:
    """Make a folder of the library's own, or let only its owner enter the one that is there."""
    make_private(folder)
    if folder.stat().st_mode & 0o077:
        folder.chmod(_PRIVATE_FOLDER)


def sync_folder(folder: Path) -> None:
    """Make sure that the names of a folder are on the disk, where the system has such a thing."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
