"""FSLoRA (arXiv 2501.19389): each client trains a sketch, a random part of the global components.

The global adapter has R components. In each round a client of rank r draws r of them and trains
``B S A`` with ``S = R / r`` on the components drawn, so that the sketch is the adapter on average.
What it changed comes back; the server adds the mean of the changes to ``B`` and ``A``, zero
where a client did not train.

From the abstract (unverified: that changes are averaged over all clients). The factor R / r
stands in ``B`` on the client and is taken out of the change again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

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
    UploadSpec,
    Weights,
    changes,
    numbered_spec,
    random_components,
)


@dataclass(frozen=True)
class FSLoRA(Method):
    """FSLoRA: random parts of the components, nothing frozen, at a download of rank r."""

    info = Info(
        "FSLoRA: random sketches of the global components",
        "arXiv 2501.19389",
        up="r*(m+n)",
        down="r*(m+n)",
        server="sums of factors",
        exempt={"gauge": "clients send changes of factors"},
    )
    features = frozenset({Feature.MIXED_RANKS, Feature.PER_MODULE})
    needs = frozenset({Mean.NUMBERED_CHANGES})

    weights: Weights = "examples"

    def handout(self, state: State, client: Client, context: RoundContext) -> Download:
        """The components drawn for this client in this round, scaled by R / r."""
        ids, adapter = random_components(state.model, client, context), {}
        for module, f in state.model.items():
            part = f.components(ids[module])
            adapter[module] = Factors(part.B * (f.rank / max(part.rank, 1)), part.A)
        return Download(Adapter(adapter), component_ids=ids)

    def upload_from(self, turn: Turn) -> Adapter:
        """What training changed in each factor."""
        return changes(turn.start.adapter, turn.trained)

    def upload_spec(self, state: State, client: Client, context: RoundContext) -> UploadSpec:
        """As many numbered components as the client's rank."""
        return numbered_spec(client, context)

    def untrained(self, download: Download, context: RoundContext) -> Adapter:
        """Nothing: changes are sent."""
        return Adapter({})

    def aggregate(self, state: State, cohort: Cohort, context: RoundContext) -> State:
        """The weighted changes, added to their components."""
        model = {
            m: cohort.numbered_changes(m, last, sketched=True).to(last.B.dtype)
            for m, last in state.model.items()
        }
        return replace(state, model=Adapter(model))
