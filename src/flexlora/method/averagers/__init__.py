"""The averagers, one per file; the file's name is the name in configs."""

import sys

from flexlora.config import Plugins
from flexlora.method.averager import Averager

PLUGINS: Plugins[Averager] = Plugins(
    sys.modules[__name__],
    Averager,  # type: ignore[type-abstract]
    "averager",
    "flexlora.averagers",
)
names, make = PLUGINS.names, PLUGINS.make
