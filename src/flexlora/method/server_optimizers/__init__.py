"""The server optimisers, one file each; the file's name is the name in configs."""

import sys

from flexlora.config import PluginFolder
from flexlora.method.server_optimizer import ServerOptimizer

KINDS: PluginFolder[ServerOptimizer] = PluginFolder(
    sys.modules[__name__],
    ServerOptimizer,  # type: ignore[type-abstract]
    "server optimizer",
)
names, make = KINDS.names, KINDS.make
