"""Paths as people write them: with ``~``, through links, too long."""

from __future__ import annotations

import os
from pathlib import Path

from flexlora.errors import ConfigError


def expanded(path: str | os.PathLike[str], label: str) -> Path:
    """The path with ``~`` resolved; nothing need be there.

    Raises:
        ConfigError: it can be no path, as a link to itself, a name that is too long, or the home
            of a user whom the system does not know; names ``label``, which sets another.
    """
    try:
        whole = Path(path).expanduser()
        whole.stat()
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return whole
    except (OSError, RuntimeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not the name of a file or folder"
        raise ConfigError(
            f"{label} is {str(path)[:200]!r}, which cannot be a path: {reason}; give another."
        ) from error
    return whole
