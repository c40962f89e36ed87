"""FLASC (arXiv 2406.05233): a dense LoRA on the server, of which only the largest entries travel.

A download holds the share ``density_down`` of all entries of B and A that is largest in
magnitude, by one threshold over all modules, and zeros elsewhere. Clients train all entries
and send their change, of it the share ``density_up`` that is largest. The server takes the
mean change D as a gradient: ``x + rate D``, or entry by entry the step of FedAdam
(arXiv 2003.00295), whose moments it remembers:

``m = b1 m + (1 - b1) D``, ``v = b2 v + (1 - b2) D^2``, ``x + rate m / (sqrt(v) + tau)``.

With both densities and the rate at 1 this is FedIT.

Differs: magnitudes are those of the effective factors, with the LoRA scale in B; the server's
Adam decays no weights. The paper's clients of fewer means have a lower density. Here means are
ranks, and as every client trains every entry, unequal ranks are refused.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from flexlora.errors import ConfigError
from flexlora.lowrank import Adapter, Factors
from flexlora.method import (
    Client,
    Download,
    Draw,
    Method,
    State,
    Upload,
    Weights,
    at_ranks,
    factor_means,
    weighted,
)

FIRST, SECOND = "first moment", "second moment"


@dataclass(frozen=True)
class FLASC(Method):
    """FLASC. ``rate`` is the server's: None is 1 for "sgd", the paper's 0.005 for "adam"."""

    title = "FLASC: the largest entries down, the largest changes up"
    paper = "arXiv 2406.05233"
    exact = False
    mixed_ranks = False
    by_module = True
    sparse = True
    up = "0.28125*r*(m+n)"  # a quarter of the entries and a bit for each
    down = "0.28125*r*(m+n)"
    server = "sums of factors, a selection"

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

    @property
    def by_rank_alone(self) -> bool:
        """One download is everybody's."""
        return True

    def handout(self, state: State, client: Client, draw: Draw) -> Download:
        """The global adapter's largest entries."""
        known = at_ranks(state.adapters["global"], client.ranks, draw)
        return Download(largest(known, self.density_down))

    def shares(self, start: Download, trained: Adapter) -> Adapter:
        """The largest entries of the change."""
        change = {
            m: Factors(f.B - start.adapter[m].B, f.A - start.adapter[m].A)
            for m, f in trained.items()
        }
        return largest(Adapter(change), self.density_up)

    def aggregate(self, state: State, uploads: Sequence[Upload]) -> State:
        """The global adapter after a step along the mean change."""
        held = weighted(uploads, self.weights)
        found: dict[str, dict[str, Factors]] = {"global": {}}
        if self.optimizer == "adam":
            found |= {FIRST: {}, SECOND: {}}
        for module, last in state.adapters["global"].items():
            mean = factor_means(held(module))
            known = [
                state.adapters[name][module] if name in state.adapters else None for name in found
            ]
            B = self._moved(mean.B, [None if f is None else f.B for f in known])
            A = self._moved(mean.A, [None if f is None else f.A for f in known])
            for name, *halves in zip(found, B, A, strict=True):
                found[name][module] = Factors(*halves).to(last.B.dtype)
        return State({name: Adapter(modules) for name, modules in found.items()}, state.facts)

    def _moved(self, change: Tensor, known: Sequence[Tensor | None]) -> list[Tensor]:
        """A factor after the step and, with Adam, its moments; ``known`` are those before."""
        last = [None if each is None else each.double() for each in known]
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
