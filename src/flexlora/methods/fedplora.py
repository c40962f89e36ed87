"""Fed-PLoRA (arXiv 2602.16936): rank-one modules; each client trains some, with the others frozen.

The global adapter is R rank-one components. In each round a client of rank r draws r of them,
adds the others to its base for this round, and trains its own from their global values. The
server averages ``B`` and ``A`` of each component over the clients that trained it, uniformly; a
component that no client trained keeps its value. With equal ranks R for all this is FedIT.

From reading notes, not from the paper's text (unverified: whether one draw is for all
modules; here each module has its own).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from flexlora.lowrank import Adapter
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
    UploadSpec,
    Weights,
    numbered_spec,
    random_components,
    with_components,
)


@dataclass(frozen=True)
class FedPLoRA(Method):
    """Fed-PLoRA: no truncation, all components trained in turn, at a download of rank R."""

    info = Info(
        "Fed-PLoRA: random rank-one components, the others frozen",
        "arXiv 2602.16936",
        up="r*(m+n)",
        down="R*(m+n)",
        server="sums of factors",
    )
    features = frozenset({Feature.MIXED_RANKS, Feature.PER_MODULE})
    needs = frozenset({Mean.NUMBERED_COMPONENTS})

    weights: Weights = "uniform"

    def handout(self, state: State, client: Client, context: RoundContext) -> Download:
        """All components, of which the client's are drawn anew for it in every round."""
        ids = random_components(state.model, client, context)
        return with_components(Download(state.model), ids)

    def upload_spec(self, state: State, client: Client, context: RoundContext) -> UploadSpec:
        """As many numbered components as the client's rank."""
        return numbered_spec(client, context)

    def aggregate(self, state: State, cohort: Cohort, context: RoundContext) -> State:
        """The mean of each component's two vectors over those who trained it."""
        model = {
            m: cohort.numbered_components(m, last).to(last.B.dtype)
            for m, last in state.model.items()
        }
        return replace(state, model=Adapter(model))
