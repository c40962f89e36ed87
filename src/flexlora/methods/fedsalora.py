"""FedSA-LoRA (arXiv 2410.01463): ``A`` is shared and averaged, ``B`` never leaves its client.

Both are trained; the server sees and averages only ``A``. Each client's model is its own:
the common ``A`` with the ``B`` that it keeps; a client that never trained has ``B = 0`` and so
the base model.
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
    truncated,
)


@dataclass(frozen=True)
class FedSALoRA(Method):
    """FedSA-LoRA. Unequal ranks are refused at start-up. There is no global model."""

    info = Info(
        "FedSA-LoRA: A shared, B private",
        "arXiv 2410.01463",
        up="r*n",
        down="r*n",
        server="sums of factors",
        exempt={"gauge": "only A is shared"},
    )
    features = frozenset({Feature.PER_MODULE, Feature.PERSONAL, Feature.SAME_FOR_EQUAL_RANKS})
    needs = frozenset({Mean.FACTORS})

    weights: Weights = "examples"

    def handout(self, state: State, client: Client, context: RoundContext) -> Download:
        """Only ``A``."""
        download = truncated(state, client, context)
        return replace(download, adapter=download.adapter.restricted("A"))

    def prepare(
        self, download: Download, private: Mapping[str, Adapter], fresh: FreshAdapters
    ) -> Download:
        """``A`` as it came, beside the client's own ``B``, at first zero."""
        own, adapter = private.get("B", Adapter({})), {}
        for module, f in download.adapter.items():
            out = fresh.shapes[module][0]
            # It may train more modules than it did when it kept them.
            B = own[module].B if module in own else torch.zeros(out, f.rank)
            # What never travels is not rounded as what travels is.
            dtype = torch.promote_types(f.A.dtype, B.dtype)
            adapter[module] = Factors(B.to(dtype), f.A.to(dtype))
        return replace(download, adapter=Adapter(adapter))

    def upload_from(self, turn: Turn) -> Adapter:
        """Only ``A``."""
        return turn.trained.restricted("A")

    def private_from(self, turn: Turn) -> Mapping[str, Adapter]:
        """``B``."""
        return {"B": turn.trained.restricted("B")}

    def upload_spec(self, state: State, client: Client, context: RoundContext) -> UploadSpec:
        """``A`` at the client's rank."""
        return factor_spec(client, context, "A")

    def aggregate(self, state: State, cohort: Cohort, context: RoundContext) -> State:
        """The mean of ``A``."""
        model = {
            m: Factors(last.B, cohort.factors(m).A.to(last.A.dtype))
            for m, last in state.model.items()
        }
        return replace(state, model=Adapter(model))
