"""Who holds which rows: pure functions from keys and randomness to index lists."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from flexlora.data.corpus import Codes
from flexlora.errors import DataError

Int64s = np.ndarray[Any, np.dtype[np.int64]]

Keys = Sequence[str] | np.ndarray[Any, Any]
"""One key a row, such as ``corpus.keys("category")``."""


@dataclass(frozen=True, eq=False)
class Partition(Mapping[str, Any]):
    """The rows of each client, ascending: a mapping from its name to a view.

    Every row has one client, every client has a row (but for ``dirichlet`` with
    ``minimum=0``). The rows of all lie in one array, client ``i``'s from ``bounds[i]`` to
    ``bounds[i + 1]``, and ``places`` has the number of each client: a client costs its name
    and some 100 bytes, a row 8.
    """

    places: Mapping[str, int]
    rows: Int64s
    bounds: Int64s

    @classmethod
    def of(cls, clients: Sequence[str], sizes: Int64s, rows: Int64s) -> Partition:
        """The partition in which the clients hold so many rows each, one after the other."""
        places = {client: place for place, client in enumerate(clients)}
        return cls(places, rows, np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64))

    def __getitem__(self, client: str) -> Int64s:
        place = self.places[client]
        return self.rows[self.bounds[place] : self.bounds[place + 1]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)

    @property
    def sizes(self) -> Int64s:
        """How many rows each client has, in the order of the clients."""
        return np.diff(self.bounds)

    def within(self, rows: Int64s) -> Partition:
        """The same partition of a part of a larger corpus: row i stands for ``rows[i]``."""
        return Partition(self.places, rows[self.rows], self.bounds)

    def where(self, mask: np.ndarray[Any, np.dtype[np.bool_]]) -> Partition:
        """The rows that the mask (one truth value for each row) is true for.

        A client without any is left out.
        """
        chosen = mask[self.rows]
        before = np.concatenate([[0], np.cumsum(chosen)])
        sizes = np.diff(before[self.bounds])
        clients = [client for client, size in zip(self.places, sizes, strict=True) if size]
        return Partition.of(clients, sizes[sizes > 0], self.rows[chosen])


def by_key(keys: Keys) -> Partition:
    """One client for each key, named by it, in order of first appearance.

    Of a corpus's ``client`` column this is the federation that the source describes; of its
    ``category`` column every client holds one category.
    """
    return by_code(*_codes(keys))


def by_code(codes: Codes | Int64s, names: Sequence[str]) -> Partition:
    """As ``by_key``, of keys that are numbered: row i has the key ``names[codes[i]]``.

    In the order of ``names``; a name without a row is left out.
    """
    sizes = np.bincount(codes, minlength=len(names))
    clients = [name for name, size in zip(names, sizes, strict=True) if size]
    return Partition.of(clients, sizes[sizes > 0], np.argsort(codes, kind="stable"))


def iid(rows: int, clients: int, rng: np.random.Generator) -> Partition:
    """Rows dealt at random to clients 0 .. clients - 1, in shares that differ by one at most.

    Raises:
        DataError: there are fewer rows than clients.
    """
    _check(rows, clients, 1)
    return _named(np.array_split(rng.permutation(rows), clients))


def dirichlet(
    labels: Keys, clients: int, alpha: float, rng: np.random.Generator, minimum: int = 1
) -> Partition:
    """Each label's rows dealt to the clients in proportions drawn from Dirichlet(alpha).

    A small ``alpha`` gives each label to few clients, a large one gives all clients the same
    mixture (Hsu et al. 2019, arXiv 1909.06335, drawn by label as in Yurochkin et al. 2019,
    arXiv 1905.12022). A client left with fewer than ``minimum`` rows then receives random
    rows of the client that holds most, one at a time, instead of a new draw of the whole,
    which might never end for a small alpha.

    Raises:
        DataError: alpha is not a positive number, or the rows do not suffice.
    """
    _check(len(labels), clients, minimum)
    if not (alpha > 0 and np.isfinite(alpha)):
        raise DataError(f"The Dirichlet concentration alpha is {alpha}; give a number > 0.")
    held: list[list[int]] = [[] for _ in range(clients)]
    for rows in by_key(labels).values():
        proportions = _proportions(clients, alpha, rng)
        ends = np.rint(np.cumsum(proportions)[:-1] * len(rows)).astype(np.int64)
        for client, part in zip(held, np.split(rng.permutation(rows), ends), strict=True):
            client += part.tolist()
    _level(held, minimum, rng)
    return _named([np.array(rows, np.int64) for rows in held])


def shards(
    labels: Keys, clients: int, shards_per_client: int, rng: np.random.Generator
) -> Partition:
    """Rows sorted by label and cut into shards, of which each client is dealt the same number.

    With few shards a client sees few labels (McMahan et al. 2017, arXiv 1602.05629,
    section 3). Shards differ by one row at most.

    Raises:
        DataError: there are fewer rows than shards.
    """
    _check(len(labels), clients, shards_per_client)
    if shards_per_client < 1:
        raise DataError(f"Each client needs at least one shard, not {shards_per_client}.")
    codes, _ = _codes(labels)
    shuffled = rng.permutation(len(codes))
    by_label = shuffled[np.argsort(codes[shuffled], kind="stable")]
    cut = np.array_split(by_label, clients * shards_per_client)
    hands = rng.permutation(len(cut)).reshape(clients, shards_per_client)
    return _named([np.concatenate([cut[shard] for shard in hand]) for hand in hands])


def _codes(keys: Keys) -> tuple[Int64s, list[str]]:
    """A number for each row's key, and the keys in order of first appearance."""
    encoded = pa.array(keys, pa.string()).dictionary_encode()
    codes = encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64)
    return codes, encoded.dictionary.to_pylist()


def _named(parts: Sequence[Int64s]) -> Partition:
    clients = [str(client) for client in range(len(parts))]
    sizes = np.array([len(rows) for rows in parts], np.int64)
    return Partition.of(clients, sizes, np.concatenate([np.sort(rows) for rows in parts]))


def _proportions(
    clients: int, alpha: float, rng: np.random.Generator
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """A Dirichlet draw; where alpha is so small that it underflows, all to one client."""
    drawn: np.ndarray[Any, np.dtype[np.float64]] = rng.dirichlet(np.full(clients, alpha))
    if np.isclose(drawn.sum(), 1):
        return drawn
    drawn = np.zeros(clients)
    drawn[rng.integers(clients)] = 1
    return drawn


def _level(held: list[list[int]], minimum: int, rng: np.random.Generator) -> None:
    """Give from the richest to those below the minimum, in place."""
    for poor in held:
        while len(poor) < minimum:
            rich = max(held, key=len)
            poor.append(rich.pop(int(rng.integers(len(rich)))))


def _check(rows: int, clients: int, per_client: int) -> None:
    if clients < 1:
        raise DataError(f"Cannot share rows among {clients} clients; ask for at least one.")
    if rows < clients * max(per_client, 0):
        raise DataError(
            f"{rows} rows do not suffice for {clients} clients of at least {per_client} each; "
            f"ask for at most {rows // max(per_client, 1)} clients."
        )
