"""The client regularisers, one file each; the file's name is the name in configs."""

import sys

from flexlora.config import PluginFolder
from flexlora.method.regularizer import Regularizer

KINDS: PluginFolder[Regularizer] = PluginFolder(
    sys.modules[__name__],
    Regularizer,  # type: ignore[type-abstract]
    "regularizer",
)
names, make = KINDS.names, KINDS.make
