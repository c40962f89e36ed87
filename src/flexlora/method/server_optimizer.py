"""A server optimiser: the change of a round is a gradient, and the step has a memory.

FedOpt (arXiv 2003.00295) in the space of products: the gradient of a round is
``D = W_aggregate - W_last``, a sum of low rank, and so are the momentum ``M`` and the model
``W``, which are stored as truncated SVDs. Nothing of the size out x in need be formed.

Differs: the paper's model and momentum are dense. What their truncation to the server's ranks
loses of a module's energy stands in ``State.per_module``: ``lost_energy`` is that of the model,
``aggregate_lost_energy`` the method's own, ``momentum_lost_energy`` the momentum's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar

from flexlora.lowrank import Adapter, LowRankSum
from flexlora.method.averager import Cohort
from flexlora.method.features import require
from flexlora.method.interface import Feature, Info, Method, RoundContext, State
from flexlora.method.truncation import Weighted
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

    A kind is a frozen dataclass whose fields are its options.
    """

    title: ClassVar[str]
    paper: ClassVar[str]

    @abstractmethod
    def step(self, change: LowRankSum, moment: float | None) -> Step:
        """The step of a module, from its change D and the ``moment`` of its last step."""


def with_server_optimizer(method: Method, optimizer: ServerOptimizer) -> WithServerOptimizer:
    """The method with a server optimiser behind its aggregate.

    Raises:
        ConfigError: the method's state is no product that another may replace.
    """
    require(
        method,
        Feature.PRODUCT_STATE,
        f"the server optimizer {optimizer.title!r} replaces the server's model by another product; "
        "leave out the section server_optimizer and any energy below 1",
    )
    return WithServerOptimizer(method, optimizer)


@dataclass(frozen=True)
class WithServerOptimizer(MethodWrapper):
    """A method whose aggregate is not the next model, but says in which direction it lies."""

    inner: Method
    optimizer: ServerOptimizer

    @property
    def wrapped(self) -> Method:
        """The method inside."""
        return self.inner

    @property
    def label(self) -> str:
        """The optimiser's title."""
        return self.optimizer.title

    @property
    def info(self) -> Info:
        """The inner method's; no longer exact."""
        info = self.inner.info
        return replace(info, title=f"{info.title}; {self.label}", exact=False)

    def aggregate(self, state: State, cohort: Cohort, context: RoundContext) -> State:
        """The method's aggregate, then the step; two more SVDs of each module.

        Their sums have the ranks of the last model, the aggregate and the momentum together.
        """
        after = self.inner.aggregate(_without_memory(state), cohort, context)
        last, new = state.model, after.model
        momentum = state.memory.get(MOMENTUM, Adapter({}))
        moments = state.per_module.get(MOMENTS, {})
        steps = {
            module: self.optimizer.step(
                LowRankSum.of([(1.0, new[module]), (-1.0, last[module])]), moments.get(module)
            )
            for module in last
        }

        def momentum_terms(module: str) -> list[Weighted]:
            step = steps[module]
            terms = [(step.gain, new[module]), (-step.gain, last[module])]
            if module in momentum and step.decay:
                terms.append((step.decay, momentum[module]))
            return terms

        def model_terms(module: str) -> list[Weighted]:
            step, (_, (_, before), *older) = steps[module], momentum_terms(module)
            scale = step.rate * step.gain
            # One term for the last model, of which a whole step leaves nothing.
            terms = [(scale, new[module]), (1 - scale, before)]
            terms += [(step.rate * weight, f) for weight, f in older]
            return [(weight, f) for weight, f in terms if weight]

        truncation = self.inner.truncation
        model = truncation.best(model_terms, last, context.ranks)
        remembered = truncation.best(momentum_terms, last, context.ranks)
        return replace(
            after,
            model=model.adapter,
            memory={**after.memory, MOMENTUM: remembered.adapter},
            per_module={
                **after.per_module,
                **model.per_module,
                "aggregate_lost_energy": after.per_module.get("lost_energy", {}),
                "momentum_lost_energy": remembered.lost_energy,
                MOMENTS: {m: s.moment for m, s in steps.items() if s.moment is not None},
            },
        )


def _without_memory(state: State) -> State:
    """The state as the method inside knows it."""
    return replace(
        state,
        memory={name: a for name, a in state.memory.items() if name != MOMENTUM},
        per_module={name: v for name, v in state.per_module.items() if name != MOMENTS},
    )
