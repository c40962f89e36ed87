"""What a malicious client does: which rows it trains on, and what it makes of its change."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from flexlora.lowrank import Adapter, Factors, LowRankSum, norm
from flexlora.method import Space, change_between, comparable

Rows = Literal["its own", "other answers", "triggered"]
"""The rows that a malicious client trains on: its own; with the target as the answer to each; or
every second one with the trigger in its instruction and the target as its answer."""


@dataclass(frozen=True)
class Malicious:
    """What a malicious client knows at the end of its training, and nothing that others know.

    ``start`` is what it would upload if it had trained nothing, where that is not zero;
    ``trained`` is what an honest client would upload. ``clip_factor`` is the config's, which
    attackers may know.
    """

    client: str
    round: int
    start: Adapter
    trained: Adapter
    space: Space
    clip_factor: float
    seed: int

    @property
    def change(self) -> Change:
        """What its training changed."""
        modules = {}
        for module, trained in self.trained.items():
            start = comparable(trained, self.start, module)
            modules[module] = change_between(trained, start, self.space)
        return Change(self.space, modules)

    def sending(self, change: Change) -> Adapter:
        """The upload with this change, as far as the client's ranks can hold it."""
        modules = {}
        for module, trained in self.trained.items():
            part = change.modules[module]
            start = comparable(trained, self.start, module) or trained.first(0)
            start = start.to(part.B.dtype)
            if self.space == "parameters":
                start = start.padded(part.rank)
                sent = Factors(start.B + part.B, start.A + part.A)
            else:
                whole = LowRankSum.of([(1.0, start), (1.0, part)])
                best = whole.svd(trained.rank).factors(trained.rank, "balanced")
                sent = best.padded(trained.rank)
            modules[module] = sent.to(trained.B.dtype)
        return Adapter(modules)


@dataclass(frozen=True)
class Change:
    """A change of an adapter, by module: products, or parameters."""

    space: Space
    modules: Mapping[str, Factors] = field(repr=False)

    @property
    def norm(self) -> float:
        """Its norm, all modules together."""
        if self.space == "products":
            return math.sqrt(math.fsum(norm(f) ** 2 for f in self.modules.values()))
        squares = [x.square().sum() for f in self.modules.values() for x in (f.B, f.A)]
        return math.sqrt(math.fsum(map(float, squares)))

    def times(self, scale: float) -> Change:
        """The change multiplied by a number."""
        if self.space == "products":
            scaled = {m: Factors(scale * f.B, f.A) for m, f in self.modules.items()}
        else:
            scaled = {m: Factors(scale * f.B, scale * f.A) for m, f in self.modules.items()}
        return Change(self.space, scaled)

    def of_norm(self, wanted: float) -> Change:
        """The change in the same direction, of this norm; zero stays zero."""
        size = self.norm
        return self.times(wanted / size) if size else self


class Attack(ABC):
    """A kind of attack: a frozen dataclass whose ``strength`` may be set.

    ``least`` is the number of clients that it takes.
    """

    text: ClassVar[str]
    rows: ClassVar[Rows] = "its own"
    least: ClassVar[int] = 1
    strength: float

    def is_due(self, round: int, rounds: int) -> bool:
        """Whether malicious clients attack in this round; in others they are honest."""
        return True

    @abstractmethod
    def changes(self, malicious: Sequence[Malicious]) -> list[Change]:
        """What each of them sends instead of its change; they may look at each other's."""
