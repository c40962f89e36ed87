"""Random generators with an address: the seed and the purpose of every draw of a run."""

from __future__ import annotations

import hashlib

import numpy as np


def rng(seed: int, *address: str | int) -> np.random.Generator:
    """The generator for ``seed`` and an address such as ``("client", id, round)``.

    The same address always gives the same stream, independent of all other draws and of
    their order, so that a single client of a single round can be replayed. Address parts are
    hashed with their lengths: ``("ab", "c")`` and ``("a", "bc")`` differ.
    """
    digest = hashlib.sha256(str(int(seed)).encode())
    for part in address:
        text = f"{type(part).__name__}:{part}".encode()
        digest.update(len(text).to_bytes(8, "little") + text)
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest.digest(), "little")))
