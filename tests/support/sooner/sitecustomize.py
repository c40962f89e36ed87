"""Flower counts a node that was killed as online for 20 seconds, and not for a minute.

For the processes of a test that have this folder on their PYTHONPATH. Flower has no setting for
it: a node sends how often it will be heard of, and twice as long is waited for it.
"""

import importlib.abc
import importlib.machinery
import sys

CONSTANTS = "flwr.common.constant"
SECONDS = 10  # the least that Flower takes


class _Sooner(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != CONSTANTS:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            assert module.HEARTBEAT_DEFAULT_INTERVAL > SECONDS
            module.HEARTBEAT_DEFAULT_INTERVAL = SECONDS

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, _Sooner())
