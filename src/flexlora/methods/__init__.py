"""The federated methods, one per file; the file's name is the name in configs."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from flexlora.config import Plugins
from flexlora.method import Method

PLUGINS: Plugins[Method] = Plugins(
    sys.modules[__name__],
    Method,  # type: ignore[type-abstract]
    "method",
    "flexlora.methods",
)
names, kind, shipped, resolve = PLUGINS.names, PLUGINS.kind, PLUGINS.shipped, PLUGINS.resolve


def make(name: str, options: Mapping[str, Any] | None = None, files: bool = True) -> Method:
    """The method called ``name`` with these hyper-parameters.

    Raises:
        ConfigError: the method or one of its options is unknown.
    """
    return PLUGINS.make({**(options or {}), "name": name}, files)
