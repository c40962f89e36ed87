"""What a data owner can give: the rank that its memory and its time allow."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Final, Literal, get_args

from flexlora.config import RankType
from flexlora.errors import ConfigError
from flexlora.federation import ClientRuntime
from flexlora.lowrank import Adapter
from flexlora.method import FreshAdapters
from flexlora.seeds import rng
from flexlora.training import ClientTask, Trained, bytes_to_train, free_bytes, train_together

_SHARE_OF_MEMORY: Final = 0.5
"""Of the free memory, for the adapter in training; the rest is for activations and others."""


@dataclass(frozen=True)
class Proposal:
    """The rank that a client proposes, and how fast it trains at it; None: not measured."""

    rank: RankType
    tokens_per_second: float | None


Modules = Literal["all", "attention", "feed_forward"]
"""Which modules a client trains."""


@dataclass(frozen=True)
class Capacity:
    """An owner's limits: a ``rank``, or what memory and ``seconds`` a turn allow (None).

    ``modules`` are those that it trains, whatever its rank.
    """

    rank: int | None = None
    memory_bytes: int | None = None
    seconds: float | None = None
    modules: Modules = "all"

    def __post_init__(self) -> None:
        if self.modules not in get_args(Modules):
            raise ConfigError(
                f"A client trains {', '.join(get_args(Modules))}, not {self.modules!r}."
            )
        for name in ("rank", "memory_bytes", "seconds"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"A client's {name} is {value}; give a number above 0.")

    def means(self, here: ClientRuntime, limit: RankType) -> Proposal:
        """The largest rank within these limits and the server's ``limit``.

        Where a rank is given it is taken. Else ranks are tried from the limit downwards,
        each half of the last, and the first is taken that fits into memory and, if seconds
        are given, whose turn would be over in time: one step at that rank is measured.

        Raises:
            ConfigError: not even rank 1 is within the limits, or what the client trains is not
                what the server lets it train.
        """
        limit = self._trained(limit)
        if not limit.by_module(list(here.base.shapes)):
            raise ConfigError(
                f"This client trains {self.modules}, and no module that the server adapts is of "
                f"that kind: {list(here.base.shapes)[:3]} and so on; join with other --modules."
            )
        if self.rank is not None:
            return Proposal(_at_most(limit, self.rank), None)
        rank = max(limit.attention, limit.feed_forward)
        while rank >= 1:
            tried = _at_most(limit, rank)
            if self._fits(here, tried):
                done = _step(here, tried)
                if self.seconds is None or _turn_seconds(here, done) <= self.seconds:
                    return Proposal(tried, done.tokens / done.seconds)
            rank //= 2
        raise ConfigError(
            f"Not even rank 1 is within this client's means ({self}); give it more memory or time."
        )

    def _trained(self, limit: RankType) -> RankType:
        """The limit of the modules that the client trains, and 0 of the others."""
        if self.modules == "all":
            return limit
        ranks = {"attention": 0, "feed_forward": 0, self.modules: getattr(limit, self.modules)}
        if not any(ranks.values()):
            raise ConfigError(
                f"This client trains {self.modules} alone, for which the server leaves no rank "
                f"({limit}); join with other --modules."
            )
        return RankType(**ranks)

    def _fits(self, here: ClientRuntime, rank: RankType) -> bool:
        free = _SHARE_OF_MEMORY * free_bytes(here.base.device)
        most = free if self.memory_bytes is None else min(free, self.memory_bytes)
        return bytes_to_train(_parameters(here, rank), here.training) <= most


def _at_most(limit: RankType, rank: int) -> RankType:
    return RankType(min(limit.attention, rank), min(limit.feed_forward, rank))


def _parameters(here: ClientRuntime, rank: RankType) -> int:
    shapes = here.base.shapes
    return sum(r * sum(shapes[module]) for module, r in rank.by_module(list(shapes)).items())


def _step(here: ClientRuntime, rank: RankType) -> Trained:
    """One step of training at this rank, on the client's own rows; what it learnt is dropped."""
    (client,) = here.rows
    shapes = here.base.shapes
    start: Adapter = FreshAdapters(shapes, here.seed).common(rank.by_module(list(shapes)))
    learner = ClientTask(f"client {client!r}", start, here.rows[client], rng(here.seed, "budget"))
    once = replace(here.training, max_steps=1, epochs=1)
    train_together(here.base, [learner], here.store, once, 1)  # the first is slower
    return train_together(here.base, [learner], here.store, once, 1)[0]


def _turn_seconds(here: ClientRuntime, step: Trained) -> float:
    """What a whole turn would take, by one of its steps."""
    (rows,) = here.rows.values()
    how = here.training
    steps = math.ceil(len(rows) / how.batch_examples) * how.epochs
    return step.seconds * (steps if how.max_steps is None else min(steps, how.max_steps))
