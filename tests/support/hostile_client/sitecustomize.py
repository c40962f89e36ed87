"""A client that sends uploads of a size that nobody asked for.

For the processes of a client that have this folder on their PYTHONPATH. Its client is registered
and honest until the file that ``HOSTILE`` names is there: with the word "equal" it sends chunks
that are all the same, which Flower stores once, with "different" random ones.
"""

import importlib.abc
import importlib.machinery
import os
import sys
from pathlib import Path

RECORDS = "flexlora.deployment.flower.records"
BYTES = 100 * 2**20


def _hostile(data):
    try:
        word = Path(os.environ["HOSTILE"]).read_text()
    except FileNotFoundError:
        return data
    return bytes(BYTES) if word == "equal" else os.urandom(BYTES)


class _Hostile(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != RECORDS:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            honest = module.payload
            module.payload = lambda data: honest(_hostile(data))

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, _Hostile())
