"""The trackers, one file each; the file's name is the name in configs."""

import sys
from collections.abc import Iterable
from pathlib import Path

from flexlora.config import Plugins
from flexlora.reporting.tracker import Tracker

KINDS: Plugins[Tracker] = Plugins(
    sys.modules[__name__],
    Tracker,  # type: ignore[type-abstract]
    "tracker",
    "flexlora.trackers",
)
names, kind = KINDS.names, KINDS.kind


def of(names: Iterable[str], folder: Path) -> list[Tracker]:
    """The trackers of these names for the run in ``folder``, each once.

    Raises:
        ConfigError: there is no such tracker, or a package that it needs is not installed.
    """
    return [kind(name).of(folder) for name in dict.fromkeys(names)]
