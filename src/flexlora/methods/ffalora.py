"""FFA-LoRA (arXiv 2403.12313), nested: one frozen ``A`` for all, of which clients use a part.

``A`` is drawn once from the run's seed and never trained; a client of rank r uses its first
r rows, trains its ``B`` and sends only that. As ``A`` is common, the mean of ``B`` is the mean
of the products. At unequal ranks each column of ``B`` is averaged over the clients that have
it, which keeps this true component by component.

Differs: the paper has equal ranks only; ``A`` does not travel, the client draws it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

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
    Turn,
    UploadSpec,
    Weights,
    factor_spec,
)


@dataclass(frozen=True)
class FFALoRA(Method):
    """FFA-LoRA: half the traffic. It wants its own, mostly higher, learning rate."""

    info = Info(
        "FFA-LoRA: one frozen A, averaged B",
        "arXiv 2403.12313",
        exact=True,
        by_component=True,
        up="r*m",
        down="r*m",
        server="sums of factors",
        exempt={"gauge": "A is not trained"},
    )
    features = frozenset(
        {
            Feature.MIXED_RANKS,
            Feature.PER_MODULE,
            Feature.COMMON_FACTORS,
            Feature.SAME_FOR_EQUAL_RANKS,
        }
    )
    needs = frozenset({Mean.FACTORS_BY_COMPONENT})

    weights: Weights = "examples"

    def handout(self, state: State, client: Client, context: RoundContext) -> Download:
        """The first columns of ``B``."""
        return Download(state.model.first(client.ranks).restricted("B"), factors="B")

    def prepare(
        self, download: Download, private: Mapping[str, Adapter], fresh: FreshAdapters
    ) -> Download:
        """``B`` as it came, beside the first rows of the common ``A``."""
        common, adapter = fresh.common(download.adapter.ranks), {}
        for module, f in download.adapter.items():
            # A is the server's to the bit: what does not travel is not rounded.
            dtype = torch.promote_types(f.B.dtype, torch.float32)
            adapter[module] = Factors(f.B.to(dtype), common[module].A.to(dtype))
        return replace(download, adapter=Adapter(adapter))

    def upload_from(self, turn: Turn) -> Adapter:
        """Only ``B``."""
        return turn.trained.restricted("B")

    def upload_spec(self, state: State, client: Client, context: RoundContext) -> UploadSpec:
        """``B`` at the client's rank."""
        return factor_spec(client, context, "B")

    def aggregate(self, state: State, cohort: Cohort, context: RoundContext) -> State:
        """The mean of each column over the clients that have it; one that none has stays."""
        model = {}
        for module, last in state.model.items():
            B = cohort.factors_by_component(module, last.restricted("B")).B
            model[module] = Factors(B.to(last.B.dtype), last.A)
        return replace(state, model=Adapter(model))
