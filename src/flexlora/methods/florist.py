"""FLoRIST (arXiv 2506.09199): FLoRA's stack, cut by SVD to a share of its energy.

Of each module's mean of products the smallest rank is kept whose squared singular values
reach ``energy`` of all; that one pair is sent to all clients, which merge it into their base
and start afresh at their own rank, as in FLoRA (the paper's appendix). ``energy`` 1 is FLoRA.

Differs: one QR-based SVD in place of the paper's three, with the same result. The paper
chooses the threshold for each model and data set between 0.80 and 0.99; the default here is
one number in between.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from flexlora.errors import ConfigError
from flexlora.lowrank import Adapter, Factors
from flexlora.method import (
    Client,
    Cohort,
    Download,
    Feature,
    FreshAdapters,
    Info,
    Mean,
    Method,
    RoundContext,
    State,
    Truncation,
    Weights,
    in_parallel,
    only_updates,
    total,
)


@dataclass(frozen=True)
class FLoRIST(Method):
    """FLoRIST. ``energy`` is the paper's threshold tau, of the squared singular values."""

    info = Info(
        "FLoRIST: stack cut to its energy, merged into the base",
        "arXiv 2506.09199",
        up="r*(m+n)",
        down="p*(m+n)",
        server="one SVD of rank S; one of all so far for the export",
        lossless={"energy": 1.0},
    )
    features = frozenset({Feature.MIXED_RANKS, Feature.PER_MODULE})
    needs = frozenset({Mean.PRODUCTS})

    energy: float = 0.9
    weights: Weights = "examples"

    def __post_init__(self) -> None:
        if not 0 < self.energy <= 1:
            raise ConfigError(f"energy is a share in (0, 1], got {self.energy}.")

    def start(self, fresh: Adapter, context: RoundContext) -> State:
        """No update at all: the model has shapes and no component."""
        return State(fresh.first(dict.fromkeys(fresh, 0)))

    def handout(self, state: State, client: Client, context: RoundContext) -> Download:
        """The updates to merge; of the adapter only its ranks."""
        return only_updates(state, client)

    def prepare(
        self, download: Download, private: Mapping[str, Adapter], fresh: FreshAdapters
    ) -> Download:
        """A fresh adapter at the client's ranks."""
        return replace(download, adapter=fresh.own(download.ranks))

    def aggregate(self, state: State, cohort: Cohort, context: RoundContext) -> State:
        """One truncated SVD of each module's mean; ranks differ by module."""

        def cut(module: str) -> Factors:
            last, mean = state.model[module], cohort.products(module)
            svd = Truncation().svd(mean.terms, last, min(mean.rank, *last.shape))
            return svd.factors(svd.rank_for(self.energy)).to(last.B.dtype)

        modules = list(state.model)
        update = Adapter(dict(zip(modules, in_parallel(cut, modules), strict=True)))
        log = state.merge_log.after(context.round, cohort.clients, update)
        return replace(state, merge_log=log)

    def global_adapter(self, state: State, context: RoundContext) -> Adapter:
        """All updates so far, as one SVD of each module."""
        return total(state.merge_log.updates.values(), state.model)
