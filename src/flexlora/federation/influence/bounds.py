"""What uploads are compared with: the median of this round's changes and of earlier ones."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flexlora.federation.influence.measure import Change

COMPARED = 20
"""With how many changes one is compared: with those of its round, and with as many of the last
rounds as are missing to this number."""

FEWEST = 3
"""Below so many changes none is refused: of two, nobody knows which is the hostile one."""

ONE_MODULE = 3.0
"""How many times further than all modules together a single one may go: single modules differ
more from client to client, and nobody may put all of a change into one."""

LEAST_SHARE = 0.1
"""A module's median counts as at least this share of the mean one: where hardly anybody changes
a module, a client that does has not done much."""


@dataclass(frozen=True)
class Accepted:
    """The relative changes of the last uploads that were aggregated, oldest first, by kind."""

    changes: Mapping[str, Sequence[Mapping[str, float]]] = field(default_factory=dict)

    def after(self, round: Sequence[Change]) -> Accepted:
        """With those of one more round, and without those that are too old to matter."""
        found = {kind: list(each) for kind, each in self.changes.items()}
        for change in round:
            for kind, norms in change.relative.items():
                found.setdefault(kind, []).append(dict(norms))
        return Accepted({kind: tuple(each[-COMPARED:]) for kind, each in found.items()})

    def to_json(self) -> dict[str, Any]:
        """As JSON holds it; no digit is lost."""
        return {kind: [dict(norms) for norms in each] for kind, each in self.changes.items()}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Accepted:
        """What ``to_json`` has made."""
        return cls({kind: tuple(each) for kind, each in content.items()})


@dataclass(frozen=True)
class Median:
    """The median relative change of each module, for one kind; over how many uploads."""

    modules: Mapping[str, float]
    count: int

    def bound(self, module: str) -> float:
        """The median of a module; where too few have trained it, the largest of the others."""
        if module in self.modules:
            return max(self.modules[module], LEAST_SHARE * self._mean)
        return max(self.modules.values())

    @property
    def _mean(self) -> float:
        return math.sqrt(math.fsum(m**2 for m in self.modules.values()) / len(self.modules))


@dataclass(frozen=True)
class Medians:
    """The medians by kind, of a round's uploads and earlier ones."""

    kinds: Mapping[str, Median]

    @classmethod
    def of(cls, round: Sequence[Change], earlier: Accepted) -> Medians:
        """With the medians of each module, the lower one of two; those of one alone are none.

        A change of zero does not count: a client without a step says nothing of the others.
        """
        kinds = {}
        for kind in dict.fromkeys(kind for change in round for kind in change.norms):
            now = [c.relative[kind] for c in round if kind in c.relative]
            missing = COMPARED - len(now)
            pool = [*earlier.changes.get(kind, ())[-missing:], *now] if missing > 0 else now
            pool = [norms for norms in pool if any(norms.values())]
            if len(pool) < 2:
                continue
            medians = _medians(pool)
            if medians:
                kinds[kind] = Median(medians, len(pool))
        return cls(kinds)

    def ratio(self, change: Change, kind: str) -> float:
        """How many times the median a change is; that of a single module counts less."""
        median = self.kinds.get(kind)
        if median is None:
            return 0.0
        usual, norms = change.usual[kind], change.norms[kind]
        bounds = {m: median.bound(m) * usual[m] for m in norms}
        whole = _length(norms.values()) / _length(bounds.values())
        single = max((norms[m] / bounds[m] for m in norms), default=0.0)
        return max(whole, single / ONE_MODULE)

    def allowed(self, change: Change, kind: str, factor: float) -> tuple[float, dict[str, float]]:
        """The largest norm of the whole change, and that of every module."""
        median, usual = self.kinds[kind], change.usual[kind]
        bounds = {m: factor * median.bound(m) * usual[m] for m in change.norms[kind]}
        return _length(bounds.values()), {m: ONE_MODULE * each for m, each in bounds.items()}


def _medians(pool: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The lower median of each module that at least two have changed."""
    by_module: dict[str, list[float]] = {}
    for norms in pool:
        for module, norm in norms.items():
            if norm > 0:
                by_module.setdefault(module, []).append(norm)
    return {
        module: sorted(each)[(len(each) - 1) // 2]
        for module, each in by_module.items()
        if len(each) > 1
    }


def _length(norms: Iterable[float]) -> float:
    return math.sqrt(math.fsum(norm**2 for norm in norms))
