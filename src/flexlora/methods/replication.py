"""Replication padding (arXiv 2406.17477): what a client lacks is filled from those who have it.

Zero padding dilutes the components that few clients have. Filled with the mean of those clients
instead, the mean of all is the mean of those that have them: each column of ``B`` and row of ``A``
is averaged over the clients that have it. PreLort and FediLoRA aggregate alike.

From the abstract (unverified: the paper fills from the clients with the better data). A component
that no client of the round has keeps its last value.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from flexlora.lowrank import Adapter
from flexlora.method import Cohort, Feature, Info, Mean, Method, RoundContext, State, Weights


@dataclass(frozen=True)
class Replication(Method):
    """Replication padding: factors averaged component by component, handed out by truncation."""

    info = Info(
        "Replication padding: factors averaged rank by rank",
        "arXiv 2406.17477",
        up="r*(m+n)",
        down="r*(m+n)",
        server="sums of factors",
    )
    features = frozenset({Feature.MIXED_RANKS, Feature.PER_MODULE, Feature.SAME_FOR_EQUAL_RANKS})
    needs = frozenset({Mean.FACTORS_BY_COMPONENT})

    weights: Weights = "examples"

    def aggregate(self, state: State, cohort: Cohort, context: RoundContext) -> State:
        """The mean of each component's two vectors over the clients that have it."""
        model = {
            m: cohort.factors_by_component(m, last).to(last.B.dtype)
            for m, last in state.model.items()
        }
        return replace(state, model=Adapter(model))
