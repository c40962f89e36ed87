"""Fed-PLoRA (arXiv 2602.16936): rank-one modules; each client trains some, folds in the rest.

The global adapter is R rank-one terms. In each round a client of rank r draws r of them,
adds the others to its base for this round, and trains its own from their global values. The
server averages ``B`` and ``A`` of each term over the clients that trained it, uniformly; a
term that nobody trained keeps its value. With equal ranks R for all this is FedIT.

From reading notes, not from the paper's text (unverified: whether one draw is for all
modules; here each module has its own).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flexlora.lowrank import Adapter, Factors
from flexlora.method import (
    Client,
    Download,
    Draw,
    Expected,
    Method,
    State,
    Upload,
    Weights,
    chosen_of,
    drawn_terms,
    numbered,
    weights_of,
)


@dataclass(frozen=True)
class FedPLoRA(Method):
    """Fed-PLoRA: no truncation, all terms trained in turn, at a download of rank R."""

    title = "Fed-PLoRA: random rank-one terms, the others folded in"
    paper = "arXiv 2602.16936"
    exact = False
    mixed_ranks = True
    by_module = True
    up = "r*(m+n)"
    down = "R*(m+n)"
    server = "sums of factors"

    weights: Weights = "uniform"

    def handout(self, state: State, client: Client, draw: Draw) -> Download:
        """All terms, of which the client's are drawn anew for it in every round."""
        known = state.adapters["global"]
        return chosen_of(Download(known), drawn_terms(known, client, draw))

    def expects(
        self, state: State, client: Client, shapes: Mapping[str, tuple[int, int]]
    ) -> Mapping[str, Expected]:
        """As many numbered terms as the client's rank."""
        return numbered(state, client, shapes)

    def aggregate(self, state: State, uploads: Sequence[Upload]) -> State:
        """The mean of each term's two vectors over those who trained it."""
        weights = weights_of(uploads, self.weights)
        modules = {}
        for module, last in state.adapters["global"].items():
            trained = [
                (w, u.terms[module], u.adapter[module])
                for w, u in zip(weights, uploads, strict=True)
            ]
            modules[module] = _means(trained, last).to(last.B.dtype)
        return State({"global": Adapter(modules)}, state.facts)


def _means(trained: Sequence[tuple[float, Sequence[int], Factors]], last: Factors) -> Factors:
    B, A = last.B.double().clone(), last.A.double().clone()
    held = B.new_zeros(last.rank)
    for weight, terms, _ in trained:
        held[list(terms)] += weight
    touched = held > 0
    B[:, touched], A[touched] = 0, 0
    for weight, terms, f in trained:
        at = list(terms)
        share = weight / held[at]
        B[:, at] += f.B.double() * share
        A[at] += f.A.double() * share[:, None]
    return Factors(B, A)
