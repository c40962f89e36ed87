"""Full-rank aggregation (Trautmann et al., arXiv 2501.06332): exact products, refactored.

The mean of the products is decomposed; its first r components are what clients train next.
Unverified: the paper's method section could not be read; this is the rule that its abstract
and citations describe.

What rank r cannot hold is either merged into every client's base for good (``remainder``
"merge", so that nothing is lost) or dropped ("drop", which at equal ranks is FlexLoRA).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

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
    Truncation,
    Weights,
    total,
    truncated,
)


@dataclass(frozen=True)
class FullRank(Method):
    """Full-rank aggregation. Unequal ranks are refused at start-up; see flexfold for those."""

    info = Info(
        "Full-rank aggregation: product SVD, remainder merged into the base",
        "arXiv 2501.06332",
        exact=True,
        up="r*(m+n)",
        down="S*(m+n)",
        server="one SVD of rank S",
    )
    features = frozenset({Feature.PER_MODULE})
    needs = frozenset({Mean.PRODUCTS})

    weights: Weights = "examples"
    remainder: Literal["merge", "drop"] = "merge"

    def handout(self, state: State, client: Client, context: RoundContext) -> Download:
        """The first components, and the remainders to merge."""
        download = truncated(state, client, context)
        return replace(download, base_updates=state.merge_log.pending(client.id))

    def aggregate(self, state: State, cohort: Cohort, context: RoundContext) -> State:
        """One SVD of each module's mean of products, to the summed rank of the uploads."""
        ranks = dict(context.ranks)
        if self.remainder == "merge":
            ranks = {
                m: min(sum(cohort.ranks(m).values()), *context.shapes[m]) for m in context.ranks
            }
        whole = Truncation().best(lambda m: cohort.product_terms(m), state.model, ranks)
        model = whole.adapter.first(context.ranks)
        if self.remainder == "drop":
            return replace(state, model=model, per_module=whole.per_module)
        rest = {
            m: f.components(range(min(context.ranks[m], f.rank), f.rank))
            for m, f in whole.adapter.items()
        }
        log = state.merge_log.after(context.round, cohort.clients, Adapter(rest))
        return replace(state, model=model, per_module=whole.per_module, merge_log=log)

    def global_adapter(self, state: State, context: RoundContext) -> Adapter:
        """All remainders and the first components, as one SVD of each module."""
        if self.remainder == "drop":
            return state.model
        return total([*state.merge_log.updates.values(), state.model], state.model)
