"""SLoRA (arXiv 2308.06522): sparse updates first, then LoRA from their SVD.

For ``rounds_sparse`` rounds clients train single entries of each module's update, a share
``density`` of them at random places, the same for all. They send the values alone, whose mean
is exact: the download tells the number from which both sides draw the places. Then one SVD of
rank r, with the singular values' roots on both factors, starts plain averaging of LoRA
factors. What the SVD cannot hold is dropped, or merged into everybody's base for good
(``remainder`` "merge": once, (out + in) min(out, in) numbers for each client).

From the abstract (unverified: the split of the SVD). The values travel as one ``B``
(entries, 1) beside an ``A`` without width. The LoRA scale has no part in the first stage.

A client holds the sparse matrix dense, between its start and its layers twice, with one
gradient: 12 bytes for each of its out x in numbers, and 4 min(out, in)^2 for the side that says
where its columns belong. ``columns`` below 1 (differs from the paper) keeps entries to that
share of the shorter side, and all of this to that share too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import ceil
from typing import Literal

import torch
from torch import Tensor

from flexlora.errors import ConfigError
from flexlora.lowrank import Adapter, Factors, Form, column
from flexlora.method import (
    Client,
    Decomposing,
    Download,
    Draw,
    Expected,
    Fresh,
    Method,
    State,
    Upload,
    Weighted,
    Weights,
    factor_means,
    logged,
    seed_of,
    summed,
    unmerged,
    weighted,
)
from flexlora.seeds import rng

_DEAD = 1e-6
"""Singular values below this share of the largest are rounding; their terms would never train."""


@dataclass(frozen=True)
class SLoRA(Method):
    """SLoRA. Unequal ranks are refused at start-up."""

    title = "SLoRA: sparse updates, then LoRA from their SVD"
    paper = "arXiv 2308.06522"
    exact = False
    mixed_ranks = False
    up = "0.01*m*n then r*(m+n)"
    down = "0.01*m*n then r*(m+n)"
    server = "sums of values and factors, one dense SVD in all"

    rounds_sparse: int = 2
    density: float = 0.01
    columns: float = 1.0
    remainder: Literal["drop", "merge"] = "drop"
    weights: Weights = "examples"

    def __post_init__(self) -> None:
        if self.rounds_sparse < 1 or not 0 < self.density <= self.columns <= 1:
            raise ConfigError(
                "rounds_sparse is at least 1 and 0 < density <= columns <= 1, got "
                f"{self.rounds_sparse}, {self.density} and {self.columns}."
            )

    def start(self, adapter: Adapter) -> State:
        """Values of zero."""
        values = {m: column(f.B.new_zeros(self._entries(f.shape))) for m, f in adapter.items()}
        shapes = {m: list(f.shape) for m, f in adapter.items()}
        facts = {"ranks": adapter.ranks, "shapes": shapes, "mask": seed_of(adapter), "rounds": 0}
        return State({"global": Adapter(values)}, facts)

    def handout(self, state: State, client: Client, draw: Draw) -> Download:
        """The values and their mask's number; later the factors, and what is to merge."""
        if self._sparse(state):
            return Download(state.adapters["global"], facts={"mask": state.facts["mask"]})
        return replace(super().handout(state, client, draw), merge=unmerged(state, client))

    def receive(self, download: Download, kept: Adapter | None, fresh: Fresh) -> Download:
        """The values at their places; the values alone beside them."""
        if "mask" not in download.facts:
            return download
        whole = {
            m: self._form(download.facts["mask"], m, fresh.shapes[m], f).factors()
            for m, f in download.adapter.items()
        }
        return replace(download, adapter=Adapter(whole), extra={"values": download.adapter})

    def form(self, start: Download) -> Mapping[str, Form] | None:
        """The values, in the first stage."""
        if "mask" not in start.facts:
            return None
        values, seed = start.extra["values"], start.facts["mask"]
        return {m: self._form(seed, m, f.shape, values[m]) for m, f in start.adapter.items()}

    def expects(
        self, state: State, client: Client, shapes: Mapping[str, tuple[int, int]]
    ) -> Mapping[str, Expected]:
        """The values as one column; later the factors at the client's rank."""
        if not self._sparse(state):
            return super().expects(state, client, shapes)
        return {m: Expected((self._entries(shape), 0), 1, 1) for m, shape in shapes.items()}

    def aggregate(self, state: State, uploads: Sequence[Upload]) -> State:
        """The means of values or of factors; after the first stage the SVD of the values."""
        held, means = weighted(uploads, self.weights), {}
        for module, last in state.adapters["global"].items():
            means[module] = factor_means(held(module)).to(last.B.dtype)
        merged = {**state.facts.get("merged", {}), **{u.client: u.round - 1 for u in uploads}}
        rounds = state.facts["rounds"] + 1
        facts = {**state.facts, "rounds": rounds, "merged": merged, "lost_energy": {}}
        after = State({**state.adapters, "global": Adapter(means)}, facts)
        return self._switched(after, uploads) if rounds == self.rounds_sparse else after

    def update(self, state: State) -> Adapter:
        """The values at their places; later the factors, with what was merged."""
        known = state.adapters["global"]
        if self._sparse(state):
            return self._whole(state)
        return known if self.remainder == "drop" else summed(state, known, [known])

    def _switched(self, state: State, uploads: Sequence[Upload]) -> State:
        """The state with factors from one SVD of the values."""
        whole, ranks = self._whole(state), state.facts["ranks"]

        def terms(module: str) -> list[Weighted]:
            return [(1.0, whole[module])]

        merge = self.remainder == "merge"
        kept = {m: min(f.shape) if merge else ranks[m] for m, f in whole.items()}
        found, facts = Decomposing("balanced").best(terms, whole, kept)
        alive = {m: _alive(f.first(min(ranks[m], f.rank))) for m, f in found.items()}
        after = State({"global": Adapter(alive)}, {**state.facts, **facts})
        if not merge:
            return after
        rest = {m: f.terms(range(alive[m].rank, f.rank)) for m, f in found.items()}
        return logged(after, Adapter(rest), uploads, after.adapters)

    def _sparse(self, state: State) -> bool:
        return int(state.facts["rounds"]) < self.rounds_sparse

    def _entries(self, shape: tuple[int, int]) -> int:
        return max(round(self.density * shape[0] * shape[1]), 1)

    def _whole(self, state: State) -> Adapter:
        """The values at their places, of the first stage."""
        seed, shapes = state.facts["mask"], state.facts["shapes"]
        return Adapter(
            {
                m: self._form(seed, m, tuple(shapes[m]), f).factors()
                for m, f in state.adapters["global"].items()
            }
        )

    def _form(self, seed: int, module: str, shape: tuple[int, int], values: Factors) -> Form:
        """The values of one module as its factors, at the places that the seed draws."""
        draw, (short, long) = rng(seed, "mask", module), sorted(shape)
        chosen = draw.permutation(short)[: max(ceil(self.columns * short), 1)]
        places = draw.choice(long * len(chosen), self._entries(shape), replace=False)
        side = torch.eye(short)[torch.from_numpy(chosen)]
        frozen = torch.from_numpy(places), side
        return Form(values.B[:, 0], partial(_formed, shape), frozen)


def _formed(shape: tuple[int, int], values: Tensor, places: Tensor, side: Tensor) -> Factors:
    """The sparse matrix dense along its longer side, and where the other side's lines belong."""
    cells = values.new_zeros(max(shape) * len(side)).scatter(0, places, values)
    dense = cells.view(-1, len(side))
    return Factors(dense, side) if shape[0] >= shape[1] else Factors(side.T, dense.T)


def _alive(factors: Factors) -> Factors:
    """The terms of a balanced SVD that are more than rounding."""
    values = factors.B.norm(dim=0).square()
    return factors.first(int((values > _DEAD * values[:1]).sum()))
