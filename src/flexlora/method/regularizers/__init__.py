"""The client regularisers, one per file; the file's name is the name in configs."""

import sys

from flexlora.config import Plugins
from flexlora.method.regularizer import Regularizer

PLUGINS: Plugins[Regularizer] = Plugins(
    sys.modules[__name__],
    Regularizer,  # type: ignore[type-abstract]
    "regularizer",
    "flexlora.regularizers",
)
names, make = PLUGINS.names, PLUGINS.make
