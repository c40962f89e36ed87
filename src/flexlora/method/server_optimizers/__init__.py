"""The server optimisers, one file each; the file's name is the name in configs."""

import sys

from flexlora.config import Kinds
from flexlora.method.server_optimizer import ServerOptimizer

KINDS: Kinds[ServerOptimizer] = Kinds(
    sys.modules[__name__],
    ServerOptimizer,  # type: ignore[type-abstract]
    "server optimizer",
)
names, make = KINDS.names, KINDS.make
