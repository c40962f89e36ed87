"""SLoRA (arXiv 2308.06522): sparse updates first, then LoRA from their SVD.

For ``rounds_sparse`` rounds clients train single entries of each module's update, a share
``density`` of them at random places, the same for all. They send only the values, whose mean is
exact: both sides draw the places from the run's seed. Then one SVD of rank r, with the singular
values' roots on both factors, starts plain averaging of LoRA factors. What the SVD cannot hold is
dropped, or merged into every client's base for good (``remainder`` "merge": once, (out + in)
min(out, in) parameters for each client).

From the abstract (unverified: the split of the SVD). The values travel as one ``B``
(entries, 1) beside an ``A`` without width. The LoRA scale has no part in the first stage.

A client stores the sparse matrix dense, between its start and its layers twice, with one
gradient: 12 bytes for each of its out x in entries, and 4 min(out, in)^2 for the side that says
where its columns belong. ``columns`` below 1 (differs from the paper) keeps entries to that
share of the shorter side, and all of this to that share too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import ceil
from typing import Literal

import torch
from torch import Tensor

from flexlora.errors import ConfigError
from flexlora.lowrank import Adapter, Factors, Parametrization, as_vector
from flexlora.method import (
    Client,
    Cohort,
    Download,
    FreshAdapters,
    Info,
    Mean,
    Method,
    ModuleSpec,
    RoundContext,
    State,
    Truncation,
    UploadSpec,
    Weights,
    total,
    truncated,
)
from flexlora.seeds import rng

_DEAD = 1e-6
"""Singular values below this share of the largest are rounding; such components never train."""


@dataclass(frozen=True)
class SLoRA(Method):
    """SLoRA. Unequal ranks are refused at start-up."""

    info = Info(
        "SLoRA: sparse updates, then LoRA from their SVD",
        "arXiv 2308.06522",
        up="0.01*m*n then r*(m+n)",
        down="0.01*m*n then r*(m+n)",
        server="sums of values and factors, one dense SVD in all",
        exempt={"gauge": "clients train single entries"},
    )
    needs = frozenset({Mean.FACTORS})

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

    def start(self, fresh: Adapter, context: RoundContext) -> State:
        """Values of zero."""
        values = {m: as_vector(f.B.new_zeros(self._entries(f.shape))) for m, f in fresh.items()}
        return State(Adapter(values))

    def handout(self, state: State, client: Client, context: RoundContext) -> Download:
        """The values; later the factors, and what is to be merged."""
        if _is_sparse(state):
            return Download(state.model, ints={"sparse": 1})
        download = truncated(state, client, context)
        return replace(download, base_updates=state.merge_log.pending(client.id))

    def prepare(
        self, download: Download, private: Mapping[str, Adapter], fresh: FreshAdapters
    ) -> Download:
        """The values at their places; only the values beside them."""
        if "sparse" not in download.ints:
            return download
        adapter = {
            m: self._parametrization(fresh.seed, m, fresh.shapes[m], f).factors()
            for m, f in download.adapter.items()
        }
        values = {"values": download.adapter}
        seed = {**download.ints, "seed": fresh.seed}
        return replace(download, adapter=Adapter(adapter), aux=values, ints=seed)

    def parametrize(self, start: Download) -> Mapping[str, Parametrization] | None:
        """The values, in the first stage."""
        if "sparse" not in start.ints:
            return None
        values, seed = start.aux["values"], start.ints["seed"]
        return {
            m: self._parametrization(seed, m, f.shape, values[m]) for m, f in start.adapter.items()
        }

    def upload_spec(self, state: State, client: Client, context: RoundContext) -> UploadSpec:
        """The values as one vector; later the factors at the client's rank."""
        if _is_sparse(state):
            entries = {m: self._entries(shape) for m, shape in context.shapes.items()}
            return UploadSpec({m: ModuleSpec((count, 0), 1, 1) for m, count in entries.items()})
        return UploadSpec(
            {
                m: ModuleSpec(shape, client.ranks[m], client.ranks[m])
                for m, shape in context.shapes.items()
            }
        )

    def aggregate(self, state: State, cohort: Cohort, context: RoundContext) -> State:
        """The averaged values or factors; after the first stage the SVD of the values."""
        averages = {m: cohort.factors(m).to(last.B.dtype) for m, last in state.model.items()}
        log = state.merge_log.after(context.round, cohort.clients)
        after = replace(state, model=Adapter(averages), merge_log=log, per_module={})
        # Not only in that round: it may have left the state as it was.
        if _is_sparse(state) and context.round >= self.rounds_sparse:
            return self._switched(after, cohort, context)
        return after

    def global_adapter(self, state: State, context: RoundContext) -> Adapter:
        """The values at their places; later the factors, with what was merged."""
        if _is_sparse(state):
            return self._whole(state, context)
        if self.remainder == "drop":
            return state.model
        return total([*state.merge_log.updates.values(), state.model], state.model)

    def _switched(self, state: State, cohort: Cohort, context: RoundContext) -> State:
        """The state with factors from one SVD of the values."""
        whole, ranks = self._whole(state, context), dict(context.ranks)
        if self.remainder == "merge":
            ranks = {m: min(f.shape) for m, f in whole.items()}
        result = Truncation("balanced").best(lambda m: [(1.0, whole[m])], whole, ranks)
        model = {
            m: _alive(f.first(min(context.ranks[m], f.rank))) for m, f in result.adapter.items()
        }
        after = replace(state, model=Adapter(model), per_module=result.per_module)
        if self.remainder == "drop":
            return after
        rest = {m: f.components(range(model[m].rank, f.rank)) for m, f in result.adapter.items()}
        log = state.merge_log.after(context.round, cohort.clients, Adapter(rest))
        return replace(after, merge_log=log)

    def _entries(self, shape: tuple[int, int]) -> int:
        return max(round(self.density * shape[0] * shape[1]), 1)

    def _whole(self, state: State, context: RoundContext) -> Adapter:
        """The values at their places, of the first stage."""
        return Adapter(
            {
                m: self._parametrization(context.seed, m, context.shapes[m], f).factors()
                for m, f in state.model.items()
            }
        )

    def _parametrization(
        self, seed: int, module: str, shape: tuple[int, int], values: Factors
    ) -> Parametrization:
        """The values of one module as its factors, at the places that the seed draws."""
        generator, (short, long) = rng(seed, "mask", module), sorted(shape)
        columns = generator.permutation(short)[: max(ceil(self.columns * short), 1)]
        places = generator.choice(long * len(columns), self._entries(shape), replace=False)
        side = torch.eye(short)[torch.from_numpy(columns)]
        frozen = torch.from_numpy(places), side
        return Parametrization(values.B[:, 0], partial(_formed, shape), frozen)


def _is_sparse(state: State) -> bool:
    """Whether the state is of the first stage, that of values."""
    return all(f.shape[1] == 0 for f in state.model.values())


def _formed(shape: tuple[int, int], values: Tensor, places: Tensor, side: Tensor) -> Factors:
    """The sparse matrix dense along its longer side, and which lines of the other side they are."""
    cells = values.new_zeros(max(shape) * len(side)).scatter(0, places, values)
    dense = cells.view(-1, len(side))
    return Factors(dense, side) if shape[0] >= shape[1] else Factors(side.T, dense.T)


def _alive(factors: Factors) -> Factors:
    """The components of a balanced SVD that are more than rounding."""
    values = factors.B.norm(dim=0).square()
    return factors.first(int((values > _DEAD * values[:1]).sum()))
