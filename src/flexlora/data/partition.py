"""Which client has which rows: pure functions from keys and a generator to row indices."""

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
"""One key per row, such as ``corpus.keys("category")``."""


@dataclass(frozen=True, eq=False)
class Partition(Mapping[str, Any]):
    """The row indices of each client, ascending: a mapping from client name to an array view.

    Every row belongs to one client, and every client has a row (except for ``dirichlet`` with
    ``minimum=0``). All row indices are in ``rows``, those of client ``i`` from ``bounds[i]``
    to ``bounds[i + 1]``; ``places`` maps a client's name to its ``i``. Memory: about 100 bytes
    plus the name per client, and 8 bytes per row.
    """

    places: Mapping[str, int]
    rows: Int64s
    bounds: Int64s

    @classmethod
    def of(cls, clients: Sequence[str], sizes: Int64s, rows: Int64s) -> Partition:
        """The partition that gives each client the next ``sizes[i]`` of the rows."""
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
        """The number of rows of each client, in the order of the clients."""
        return np.diff(self.bounds)

    def within(self, rows: Int64s) -> Partition:
        """The same partition in the row numbers of a larger corpus: row i is its ``rows[i]``."""
        return Partition(self.places, rows[self.rows], self.bounds)

    def where(self, mask: np.ndarray[Any, np.dtype[np.bool_]]) -> Partition:
        """The partition of the rows for which the mask (rows,) is true.

        A client without such a row is left out.
        """
        chosen = mask[self.rows]
        chosen_before = np.concatenate([[0], np.cumsum(chosen)])
        sizes = np.diff(chosen_before[self.bounds])
        clients = [client for client, size in zip(self.places, sizes, strict=True) if size]
        return Partition.of(clients, sizes[sizes > 0], self.rows[chosen])


def by_key(keys: Keys) -> Partition:
    """One client for each key, with the key as its name, in order of first appearance.

    With the keys of a corpus's ``client`` column this is the partition of the source; with
    those of its ``category`` column every client has one category.
    """
    return by_code(*_codes(keys))


def by_code(codes: Codes | Int64s, names: Sequence[str]) -> Partition:
    """As ``by_key``, for numbered keys: row i has the key ``names[codes[i]]``.

    Clients are in the order of ``names``; a name without a row is left out.
    """
    sizes = np.bincount(codes, minlength=len(names))
    clients = [name for name, size in zip(names, sizes, strict=True) if size]
    return Partition.of(clients, sizes[sizes > 0], np.argsort(codes, kind="stable"))


def iid(rows: int, clients: int, rng: np.random.Generator) -> Partition:
    """Rows assigned at random to clients "0", "1", ..., whose sizes differ by at most one.

    Raises:
        DataError: there are fewer rows than clients.
    """
    _check(rows, clients, 1)
    return _named(np.array_split(rng.permutation(rows), clients))


def dirichlet(
    labels: Keys, clients: int, alpha: float, rng: np.random.Generator, minimum: int = 1
) -> Partition:
    """Each label's rows split among the clients in proportions drawn from Dirichlet(alpha).

    A small ``alpha`` gives each label to few clients, a large one gives all clients the same
    mixture (Hsu et al. 2019, arXiv 1909.06335, drawn by label as in Yurochkin et al. 2019,
    arXiv 1905.12022). A client with fewer than ``minimum`` rows then receives random rows of
    the client that has most, one at a time. Redrawing the whole partition instead might never
    end for a small alpha.

    Raises:
        DataError: alpha is not a positive number, or there are too few rows.
    """
    _check(len(labels), clients, minimum)
    if not (alpha > 0 and np.isfinite(alpha)):
        raise DataError(f"The Dirichlet concentration alpha is {alpha}; give a number > 0.")
    rows_by_client: list[list[int]] = [[] for _ in range(clients)]
    for rows in by_key(labels).values():
        proportions = _proportions(clients, alpha, rng)
        ends = np.rint(np.cumsum(proportions)[:-1] * len(rows)).astype(np.int64)
        pieces = np.split(rng.permutation(rows), ends)
        for client_rows, piece in zip(rows_by_client, pieces, strict=True):
            client_rows += piece.tolist()
    _fill_up(rows_by_client, minimum, rng)
    return _named([np.array(rows, np.int64) for rows in rows_by_client])


def shards(
    labels: Keys, clients: int, shards_per_client: int, rng: np.random.Generator
) -> Partition:
    """Rows sorted by label and cut into shards; each client gets the same number of shards.

    With few shards a client has few labels (McMahan et al. 2017, arXiv 1602.05629,
    section 3). Shards differ by at most one row.

    Raises:
        DataError: there are fewer rows than shards.
    """
    _check(len(labels), clients, shards_per_client)
    if shards_per_client < 1:
        raise DataError(
            f"data.partition.shards_per_client is {shards_per_client}; give at least 1."
        )
    codes, _ = _codes(labels)
    shuffled = rng.permutation(len(codes))
    by_label = shuffled[np.argsort(codes[shuffled], kind="stable")]
    pieces = np.array_split(by_label, clients * shards_per_client)
    assigned = rng.permutation(len(pieces)).reshape(clients, shards_per_client)
    return _named([np.concatenate([pieces[shard] for shard in own]) for own in assigned])


def _codes(keys: Keys) -> tuple[Int64s, list[str]]:
    """The number of each row's key, (rows,), and the keys in order of first appearance."""
    encoded = pa.array(keys, pa.string()).dictionary_encode()
    codes = encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64)
    return codes, encoded.dictionary.to_pylist()


def _named(rows_by_client: Sequence[Int64s]) -> Partition:
    """The partition of clients named "0", "1", ..."""
    clients = [str(client) for client in range(len(rows_by_client))]
    sizes = np.array([len(rows) for rows in rows_by_client], np.int64)
    sorted_rows = np.concatenate([np.sort(rows) for rows in rows_by_client])
    return Partition.of(clients, sizes, sorted_rows)


def _proportions(
    clients: int, alpha: float, rng: np.random.Generator
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """A Dirichlet draw (clients,); if alpha is so small that it underflows, one client gets 1."""
    drawn: np.ndarray[Any, np.dtype[np.float64]] = rng.dirichlet(np.full(clients, alpha))
    if np.isclose(drawn.sum(), 1):
        return drawn
    drawn = np.zeros(clients)
    drawn[rng.integers(clients)] = 1
    return drawn


def _fill_up(rows_by_client: list[list[int]], minimum: int, rng: np.random.Generator) -> None:
    """Move rows, in place, from the largest client to those below the minimum."""
    for rows in rows_by_client:
        while len(rows) < minimum:
            largest = max(rows_by_client, key=len)
            rows.append(largest.pop(int(rng.integers(len(largest)))))


def _check(rows: int, clients: int, per_client: int) -> None:
    if clients < 1:
        raise DataError(f"Cannot split rows among {clients} clients; give at least one.")
    if rows < clients * max(per_client, 0):
        raise DataError(
            f"{rows} rows do not suffice for {clients} clients of at least {per_client} each; "
            f"set data.partition.clients to at most {rows // max(per_client, 1)}."
        )
