"""A server optimiser: the change of a round is a gradient, and the step has a memory.

FedOpt (arXiv 2003.00295) in the space of products: the gradient of a round is
``D = W_aggregate - W_last``, a sum of low rank, and so are the momentum ``M`` and the model
``W``, which are held as truncated SVDs. Nothing of the size out x in need be formed.

Differs: the paper's model and momentum are dense. What their truncation to the server's ranks
loses of a module's energy stands in the facts, ``step_lost_energy`` and
``momentum_lost_energy``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from flexlora.errors import ConfigError
from flexlora.lowrank import LowRankSum
from flexlora.method.averaging import Decomposing, Weighted
from flexlora.method.interface import Method, State, Upload
from flexlora.method.wrapper import MethodWrapper

MOMENTUM, MOMENTS = "momentum", "second_moments"


@dataclass(frozen=True)
class Step:
    """One module's step: ``M' = decay M + gain D``, then ``W' = W + rate M'``.

    ``moment`` is what else is remembered of the module, if anything.
    """

    decay: float
    gain: float
    rate: float
    moment: float | None = None


class ServerOptimizer(ABC):
    """How far, and in which direction, the server follows the change of a round.

    A kind is a frozen dataclass in a file of its own under ``server_optimizers/``.
    """

    title: ClassVar[str]
    paper: ClassVar[str]

    @abstractmethod
    def step(self, change: LowRankSum, moment: float | None) -> Step:
        """The step of a module, from its change D and the ``moment`` of its last step."""


@dataclass(frozen=True)
class WithServerOptimizer(MethodWrapper):
    """A method whose aggregate is not the next model, but says which way it lies.

    Raises:
        ConfigError: the method's state is no product that another may replace.
    """

    optimizer: ServerOptimizer

    def __post_init__(self) -> None:
        MethodWrapper.__post_init__(self)
        inner, optimizer = self.method, self.optimizer
        if not inner.product:
            raise ConfigError(
                f"The server optimizer {optimizer.title!r} replaces the server's model by another "
                f"product; that of {inner.title!r} is not a product alone. Leave the section "
                "server_optimizer out, or use a method such as 'flexlora', 'raflora' or 'flexfold'."
            )
        if getattr(inner, "energy", 1.0) != 1.0:
            raise ConfigError(
                f"{inner.title} cuts its model at an energy of {getattr(inner, 'energy')}, and the "  # noqa: B009
                f"server optimizer {optimizer.title!r} would undo it; set method.energy = 1."
            )
        object.__setattr__(self, "title", f"{inner.title}; {optimizer.title}")
        object.__setattr__(self, "exact", False)

    def aggregate(self, state: State, uploads: Sequence[Upload]) -> State:
        """The method's aggregate, then the step; two more SVDs of each module.

        Their sums have the ranks of the last model, the aggregate and the momentum together.
        """
        found = self.method.aggregate(_without_memory(state), uploads)
        last, new = state.adapters["global"], found.adapters["global"]
        momentum, moments = state.adapters.get(MOMENTUM), state.facts.get(MOMENTS, {})
        steps = {
            module: self.optimizer.step(
                LowRankSum.of([(1.0, new[module]), (-1.0, last[module])]), moments.get(module)
            )
            for module in last
        }

        def memory(module: str) -> list[Weighted]:
            step = steps[module]
            terms = [(step.gain, new[module]), (-step.gain, last[module])]
            if momentum is not None and step.decay:
                terms.append((step.decay, momentum[module]))
            return terms

        def model(module: str) -> list[Weighted]:
            step, (_, known, *older) = steps[module], memory(module)
            pace = step.rate * step.gain
            # One term for the last model, of which a whole step leaves nothing.
            moved = [(pace, new[module]), (1 - pace, known[1])]
            moved += [(step.rate * weight, f) for weight, f in older]
            return [(weight, f) for weight, f in moved if weight]

        how, ranks = _decomposing(self.method), state.facts["ranks"]
        stepped, facts = how.best(model, last, ranks)
        remembered, forgot = how.best(memory, last, ranks)
        return State(
            {**found.adapters, "global": stepped, MOMENTUM: remembered},
            {
                **found.facts,
                "step_lost_energy": facts["lost_energy"],
                "momentum_lost_energy": forgot["lost_energy"],
                MOMENTS: {m: s.moment for m, s in steps.items() if s.moment is not None},
            },
        )


def _without_memory(state: State) -> State:
    """The state as the method knows it."""
    adapters = {name: a for name, a in state.adapters.items() if name != MOMENTUM}
    return State(adapters, {name: f for name, f in state.facts.items() if name != MOMENTS})


def _decomposing(method: Method) -> Decomposing:
    """How the method decomposes its own products."""
    return Decomposing(*(getattr(method, name) for name in ("split", "precision", "accuracy")))
