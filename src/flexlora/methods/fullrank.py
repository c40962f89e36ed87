"""Full-rank aggregation (Trautmann et al., arXiv 2501.06332): exact products, refactored.

The mean of the products is decomposed; its first r terms are what clients train next.
Unverified: the paper's method section could not be read; this is the rule that its abstract
and citations describe.

What rank r cannot hold is either merged into everybody's base for good (``remainder``
"merge", so that nothing is lost) or dropped ("drop", which at equal ranks is FlexLoRA).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from flexlora.lowrank import Adapter
from flexlora.method import (
    Client,
    Decomposing,
    Download,
    Draw,
    Method,
    State,
    Upload,
    Weights,
    logged,
    summed,
    unmerged,
    weighted,
)


@dataclass(frozen=True)
class FullRank(Method):
    """Full-rank aggregation. Unequal ranks are refused at start-up; see flexfold for those."""

    title = "Full-rank aggregation: product SVD, remainder merged into the base"
    paper = "arXiv 2501.06332"
    exact = True
    mixed_ranks = False
    by_module = True
    up = "r*(m+n)"
    down = "S*(m+n)"
    server = "one SVD of rank S"

    weights: Weights = "examples"
    remainder: Literal["merge", "drop"] = "merge"

    def handout(self, state: State, client: Client, draw: Draw) -> Download:
        """The first terms, and the remainders to merge."""
        download = super().handout(state, client, draw)
        return replace(download, merge=unmerged(state, client))

    def aggregate(self, state: State, uploads: Sequence[Upload]) -> State:
        """One SVD of each module's mean of products, to the summed rank of the uploads."""
        terms, known = weighted(uploads, self.weights), state.adapters["global"]

        merge = self.remainder == "merge"
        kept = state.facts["ranks"]
        ranks = {
            m: min(sum(f.rank for _, f in terms(m)), *known[m].shape) if merge else kept[m]
            for m in known
        }
        whole, facts = Decomposing().best(terms, known, ranks)
        adapters = {"global": whole.first(kept)}
        if not merge:
            return State(adapters, {**state.facts, **facts})
        rest = Adapter({m: f.terms(range(min(kept[m], f.rank), f.rank)) for m, f in whole.items()})
        return logged(state, rest, uploads, adapters)

    def update(self, state: State) -> Adapter:
        """All remainders and the first terms, as one SVD of each module."""
        known = state.adapters["global"]
        return summed(state, known, [known]) if self.remainder == "merge" else known
