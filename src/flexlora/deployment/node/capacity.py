"""What a client's machine can train: the rank that its memory and its time allow."""

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
"""Part of the free memory for the adapter, its gradients and the optimizer's state; the rest is for
activations and other programs."""

_SHARE_OF_SECONDS: Final = 0.7
"""Part of the time of a round that the measured speed may need: steps differ in length."""


@dataclass(frozen=True)
class Proposal:
    """The rank that a client proposes, and its training speed at it; None if not measured."""

    rank: RankType
    tokens_per_second: float | None


Modules = Literal["all", "attention", "feed_forward"]
"""The modules that a client trains."""


@dataclass(frozen=True)
class Capacity:
    """A client's limits: a ``rank``, or None to choose it by memory and time.

    ``memory_bytes`` limits the adapter in training, ``seconds`` the local training of one round.
    ``modules`` are those that the client trains.
    """

    rank: int | None = None
    memory_bytes: int | None = None
    seconds: float | None = None
    modules: Modules = "all"

    def __post_init__(self) -> None:
        if self.modules not in get_args(Modules):
            raise ConfigError(
                f"A client can train {', '.join(get_args(Modules))}, not {self.modules!r}."
            )
        for name in ("rank", "memory_bytes", "seconds"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"A client's {name} is {value}; give a number above 0.")

    def propose(self, runtime: ClientRuntime, limit: RankType) -> Proposal:
        """The largest rank within these limits and the server's ``limit``.

        A given rank is used. Otherwise the limit is tried, then half of it, and so on. The first
        rank is used that fits into memory and, if ``seconds`` is given, whose local training
        would finish in time; for that, one step is measured at each rank that fits.

        Raises:
            ConfigError: even rank 1 is above the limits, or the server adapts none of the modules
                that this client trains.
        """
        limit = self._trained(limit)
        if not limit.by_module(list(runtime.base.shapes)):
            raise ConfigError(
                f"This client trains {self.modules}, but the server adapts no such modules: "
                f"{list(runtime.base.shapes)[:3]} and so on; join with other --modules."
            )
        if self.rank is not None:
            return Proposal(_at_most(limit, self.rank), None)
        rank = max(limit.attention, limit.feed_forward)
        while rank >= 1:
            proposed = _at_most(limit, rank)
            if self._fits(runtime, proposed):
                step = _step(runtime, proposed)
                if self.seconds is None or _fits_into(self.seconds, runtime, step):
                    return Proposal(proposed, step.tokens / step.seconds)
            rank //= 2
        raise ConfigError(
            f"Even rank 1 is above this client's limits ({self}); raise --memory or --seconds."
        )

    def _trained(self, limit: RankType) -> RankType:
        """The limit, with 0 for modules that the client does not train."""
        if self.modules == "all":
            return limit
        ranks = {"attention": 0, "feed_forward": 0, self.modules: getattr(limit, self.modules)}
        if not any(ranks.values()):
            raise ConfigError(
                f"This client trains only {self.modules}, for which the server's limit is rank 0 "
                f"({limit}); join with other --modules."
            )
        return RankType(**ranks)

    def _fits(self, runtime: ClientRuntime, rank: RankType) -> bool:
        free = _SHARE_OF_MEMORY * free_bytes(runtime.base.device)
        most = free if self.memory_bytes is None else min(free, self.memory_bytes)
        return bytes_to_train(_parameters(runtime, rank), runtime.training) <= most


def _at_most(limit: RankType, rank: int) -> RankType:
    return RankType(min(limit.attention, rank), min(limit.feed_forward, rank))


def _parameters(runtime: ClientRuntime, rank: RankType) -> int:
    shapes = runtime.base.shapes
    return sum(r * sum(shapes[module]) for module, r in rank.by_module(list(shapes)).items())


def _step(runtime: ClientRuntime, rank: RankType) -> Trained:
    """Measure one training step at this rank on the client's own rows; the result is dropped."""
    (client,) = runtime.rows
    shapes = runtime.base.shapes
    start: Adapter = FreshAdapters(shapes, runtime.seed).common(rank.by_module(list(shapes)))
    task = ClientTask(
        f"client {client!r}", start, runtime.rows[client], rng(runtime.seed, "budget")
    )
    once = replace(runtime.training, max_steps=1, epochs=1)
    train_together(runtime.base, [task], runtime.store, once, 1)  # the first is slower
    return train_together(runtime.base, [task], runtime.store, once, 1)[0]


def _fits_into(seconds: float, runtime: ClientRuntime, step: Trained) -> bool:
    """Whether the local training of a round ends in time; it is ended where it does not."""
    return _turn_seconds(runtime, step) <= _SHARE_OF_SECONDS * seconds


def _turn_seconds(runtime: ClientRuntime, step: Trained) -> float:
    """The time of one round's local training, estimated from one step."""
    (rows,) = runtime.rows.values()
    training = runtime.training
    steps = math.ceil(len(rows) / training.batch_examples) * training.epochs
    return step.seconds * (steps if training.max_steps is None else min(steps, training.max_steps))
