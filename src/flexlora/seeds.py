"""Randomness with an address: every draw of a run is named by seed and purpose."""

from __future__ import annotations

import hashlib

import numpy as np


def rng(seed: int, *address: str | int) -> np.random.Generator:
    """The generator that belongs to ``seed`` and an address such as ``("client", id, round)``.

    The same address always gives the same stream, whatever was drawn elsewhere and in
    whatever order, so that one client of one round can be replayed alone. Addresses are
    hashed with their lengths: ``("ab", "c")`` and ``("a", "bc")`` differ.
    """
    digest = hashlib.sha256(str(int(seed)).encode())
    for part in address:
        text = f"{type(part).__name__}:{part}".encode()
        digest.update(len(text).to_bytes(8, "little") + text)
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest.digest(), "little")))
