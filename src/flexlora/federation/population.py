"""The clients of a run, as the round loop sees them."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from flexlora.method import Client


class Population(Mapping[str, Client]):
    """The clients that train, in the order in which they are counted."""

    @property
    @abstractmethod
    def kinds(self) -> Mapping[str, Mapping[str, int]]:
        """The ranks by module of every rank type that a client has, smallest types first."""

    @property
    @abstractmethod
    def counts(self) -> Mapping[str, int]:
        """How many clients are of each of these types."""


@dataclass(frozen=True)
class Clients(Population):
    """The clients of a simulation; each is made when it is looked up.

    ``rows`` has each client's training rows, ``types`` its rank type, ``ranks`` each type's
    rank by module.
    """

    rows: Mapping[str, Sequence[int]]
    types: Mapping[str, str]
    ranks: Mapping[str, Mapping[str, int]]

    def __getitem__(self, id: str) -> Client:
        examples, kind = len(self.rows[id]), self.types[id]
        return Client(id, self.ranks[kind], kind, examples)

    def __iter__(self) -> Iterator[str]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def kinds(self) -> Mapping[str, Mapping[str, int]]:
        """The ranks of the types that a client has."""
        return {kind: self.ranks[kind] for kind in self.counts}

    @cached_property
    def counts(self) -> Mapping[str, int]:
        """How many clients are of each type."""
        counts = Counter(self.types[id] for id in self.rows)
        return {kind: counts[kind] for kind in self.ranks if counts[kind]}
