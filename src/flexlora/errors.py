"""The library's own exceptions: faults that a user can mend, by what is at fault.

``sentence`` is the one place that decides which exceptions are such faults.

The command line reports everything below ``FlexloraError`` as one sentence. Any other exception is
a fault of the library or of a plug-in, and shows its traceback. All of these are ``ValueError`` as
well, so that code which catches that keeps working.
"""

from __future__ import annotations

import errno
import shutil
from typing import Final


class FlexloraError(ValueError):
    """A fault that the user can mend; the message is a sentence with the value and the remedy."""


class ConfigError(FlexloraError):
    """A config, an option or a missing package; names the key, and its line where there is one."""


class DataError(FlexloraError):
    """Rows, a file of rows, or a partition that cannot be used."""


class AdapterError(FlexloraError):
    """An adapter or a base model that cannot be read, or an adapter of another base model."""


class ProtocolError(FlexloraError):
    """A message, a key or a run's folder that is not what it must be."""


_REFUSED: Final = frozenset(
    getattr(errno, name)
    for name in (
        *("EACCES", "EPERM", "EROFS", "ENOSPC", "EDQUOT", "EFBIG", "EIO", "EMFILE", "ENFILE"),
        *("ENAMETOOLONG", "ENOTDIR", "EISDIR", "ETXTBSY", "EBUSY", "ELOOP", "EMLINK", "ESTALE"),
    )
    if hasattr(errno, name)
)
"""Errors of files that the user can mend, also where they do not name the file: a full disk."""

_REMEDIES: Final = {
    errno.ENOSPC: " Free some space, or give a folder on another disk.",
    errno.EACCES: " Change its permissions, or give another folder.",
    errno.EPERM: " Change its permissions, or give another folder.",
    errno.EROFS: " Give a folder that can be written to.",
    errno.ENOTDIR: " A folder is needed there, and it is a file.",
    errno.EISDIR: " A file is needed there, and it is a folder.",
    errno.ENAMETOOLONG: " Give a shorter name.",
    errno.ELOOP: " It is a link that leads to itself; give another path.",
    errno.EIO: " The disk may be failing; copy the files to another one.",
}


def sentence(error: BaseException) -> str | None:
    """What a user reads of an error that is not a fault of the library; None of one that is.

    Beside the library's own that are errors of the system which name a file, and those that only
    a disk, a limit or a permission can cause.
    """
    if isinstance(error, FlexloraError):
        return str(error)
    if isinstance(error, RuntimeError) and str(error).startswith("Symlink loop"):
        return f"{error}; give another path."  # as pathlib says it before Python 3.13
    if isinstance(error, shutil.Error):
        return _of_copies(error)
    if not isinstance(error, OSError) or not error.errno:
        return None
    if error.errno not in _REFUSED and not isinstance(error.filename, str | bytes):
        return None
    file = "a file" if error.filename is None else error.filename
    remedy = _REMEDIES.get(error.errno, "")
    return f"The system refused to read or write {file}: {error.strerror}.{remedy}"


def _of_copies(error: shutil.Error) -> str | None:
    """The sentence on a folder that could not be copied: of the first of its files."""
    failed = error.args[0] if error.args else ()
    if not isinstance(failed, list) or not failed or len(failed[0]) != 3:
        return None
    _, target, reason = failed[0]
    reason = str(reason).rpartition("] ")[2].partition(": '")[0]
    return (
        f"The system refused to write {target}: {reason}. Free some space, or change the "
        "permissions of its folder."
    )
