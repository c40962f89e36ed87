"""Temporary folders that do not outlive the process for long, however it ends."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from flexlora.errors import ConfigError
from flexlora.storage.locks import LOCK, is_locked, locked

_NAME: Final = re.compile(r"flexlora-([a-z]+-)?[a-z0-9_]{8}")
_NEW_SECONDS: Final = 3600.0
"""A folder without a lock is empty, and its process may be about to lock it."""


@contextmanager
def scratch(kind: str = "", place: Path | None = None) -> Iterator[Path]:
    """A folder among the temporary files, for this user alone, removed at the end of the block.

    It is locked as long as it is in use. What processes left behind that were killed is removed
    at the next call, by whichever process of the same user.

    Raises:
        ConfigError: there is no place for temporary files.
    """
    try:
        top = place or Path(tempfile.gettempdir())
        remove_abandoned(top)
        prefix = f"flexlora-{kind}-" if kind else "flexlora-"
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=top))
    except OSError as error:
        raise ConfigError(
            f"No temporary folder can be made ({error.strerror}); set TMPDIR to a folder that can "
            "be written to."
        ) from error
    try:
        with locked(folder):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_abandoned(top: Path) -> None:
    """Remove this user's temporary folders in ``top`` that no process has locked."""
    for folder in top.glob("flexlora-*"):
        with suppress(OSError):
            if _is_abandoned(folder):
                shutil.rmtree(folder, ignore_errors=True)


def _is_abandoned(folder: Path) -> bool:
    if not _NAME.fullmatch(folder.name) or folder.is_symlink() or not folder.is_dir():
        return False
    status = folder.stat()
    if hasattr(os, "getuid") and status.st_uid != os.getuid():
        return False
    if (folder / LOCK).exists():
        return not is_locked(folder / LOCK)
    return not any(folder.iterdir()) and time.time() - status.st_mtime > _NEW_SECONDS
