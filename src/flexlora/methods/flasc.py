"""FLASC (arXiv 2406.05233): a dense LoRA on the server, of which only the largest entries travel.

A download holds the share ``density_down`` of all entries of B and A that is largest in
magnitude, by one threshold over all modules, and zeros elsewhere. Clients train all entries
and send their change, of it the share ``density_up`` that is largest. The server takes the
mean change D as a gradient: ``x + rate D``, or entry by entry the step of FedAdam
(arXiv 2003.00295), whose moments it remembers:

``m = b1 m + (1 - b1) D``, ``v = b2 v + (1 - b2) D^2``, ``x + rate m / (sqrt(v) + tau)``.

With both densities and the rate at 1 this is FedIT.

Differs: magnitudes are those of the effective factors, with the LoRA scale in B; the server's
Adam decays no weights. The paper's weaker clients have a lower density. Here a weaker client has a
lower rank, and as every client trains every entry, unequal ranks are refused.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from flexlora.errors import ConfigError
from flexlora.lowrank import Adapter, Factors
from flexlora.method import (
    Client,
    Cohort,
    Download,
    Feature,
    Info,
    Mean,
    Method,
    RoundContext,
    State,
    Turn,
    Weights,
    changes,
    truncated,
)

FIRST, SECOND = "first moment", "second moment"


@dataclass(frozen=True)
class FLASC(Method):
    """FLASC. ``rate`` is the server's: None is 1 for "sgd", the paper's 0.005 for "adam"."""

    info = Info(
        "FLASC: the largest entries down, the largest changes up",
        "arXiv 2406.05233",
        up="0.28125*r*(m+n)",  # a quarter of the entries and a bit for each
        down="0.28125*r*(m+n)",
        server="sums of factors, a selection",
        exempt={"gauge": "clients send changes of factors"},
        lossless={"density_down": 1.0, "density_up": 1.0},
    )
    features = frozenset(
        {Feature.PER_MODULE, Feature.SPARSE_MESSAGES, Feature.SAME_FOR_EQUAL_RANKS}
    )
    needs = frozenset({Mean.FACTORS})

    density_down: float = 0.25
    density_up: float = 0.25
    optimizer: Literal["sgd", "adam"] = "sgd"
    rate: float | None = None
    betas: tuple[float, float] = (0.9, 0.99)
    tau: float = 1e-3
    weights: Weights = "examples"

    def __post_init__(self) -> None:
        for name in ("density_down", "density_up"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(f"{name} is a share in (0, 1], got {getattr(self, name)}.")
        for name in ("rate", "tau"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"{name} is finite and above 0, got {value}.")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"betas lie in [0, 1), got {self.betas}.")

    def handout(self, state: State, client: Client, context: RoundContext) -> Download:
        """The model's largest entries."""
        download = truncated(state, client, context)
        return replace(download, adapter=largest(download.adapter, self.density_down))

    def upload_from(self, turn: Turn) -> Adapter:
        """The largest entries of the change."""
        return largest(changes(turn.start.adapter, turn.trained), self.density_up)

    def untrained(self, download: Download, context: RoundContext) -> Adapter:
        """Nothing: changes are sent."""
        return Adapter({})

    def aggregate(self, state: State, cohort: Cohort, context: RoundContext) -> State:
        """The model after a step along the mean change."""
        names = ["", FIRST, SECOND] if self.optimizer == "adam" else [""]
        before = {"": state.model, **state.memory}
        after: dict[str, dict[str, Factors]] = {name: {} for name in names}
        for module, last in state.model.items():
            mean = cohort.factors(module)
            values = [before[name][module] if name in before else None for name in names]
            B = self._stepped(mean.B, [None if f is None else f.B for f in values])
            A = self._stepped(mean.A, [None if f is None else f.A for f in values])
            for name, *factors in zip(names, B, A, strict=True):
                after[name][module] = Factors(*factors).to(last.B.dtype)
        adapters = {name: Adapter(modules) for name, modules in after.items()}
        model = adapters.pop("")
        return replace(state, model=model, memory=adapters)

    def _stepped(self, change: Tensor, before: Sequence[Tensor | None]) -> list[Tensor]:
        """A factor after the step and, with Adam, its moments; ``before`` are those before."""
        last = [None if each is None else each.double() for each in before]
        assert last[0] is not None
        if self.optimizer == "sgd":
            return [last[0] + (1.0 if self.rate is None else self.rate) * change]
        b1, b2 = self.betas
        first = torch.zeros_like(change) if last[1] is None else last[1]
        second = torch.full_like(change, self.tau**2) if last[2] is None else last[2]
        first = b1 * first + (1 - b1) * change
        second = b2 * second + (1 - b2) * change.square()
        rate = 0.005 if self.rate is None else self.rate
        return [last[0] + rate * first / (second.sqrt() + self.tau), first, second]


def largest(adapter: Adapter, density: float) -> Adapter:
    """The adapter with this share of its entries, the largest of all modules, and zeros else.

    Entries as large as the smallest of them are kept too.
    """
    if density == 1:
        return adapter
    sizes = torch.cat([x.abs().flatten() for f in adapter.values() for x in (f.B, f.A)])
    kept = math.ceil(density * len(sizes))
    least = sizes.kthvalue(len(sizes) - kept + 1).values

    def cut(x: Tensor) -> Tensor:
        # Not by a product: zeros with a sign would travel.
        return x.where(x.abs() >= least, torch.zeros_like(x))

    return Adapter({m: Factors(cut(f.B), cut(f.A)) for m, f in adapter.items()})
