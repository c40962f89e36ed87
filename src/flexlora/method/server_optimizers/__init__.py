"""The server optimisers, one per file; the file's name is the name in configs."""

import sys

from flexlora.config import Plugins
from flexlora.method.server_optimizer import ServerOptimizer

PLUGINS: Plugins[ServerOptimizer] = Plugins(
    sys.modules[__name__],
    ServerOptimizer,  # type: ignore[type-abstract]
    "server optimizer",
    "flexlora.server_optimizers",
)
names, make = PLUGINS.names, PLUGINS.make
