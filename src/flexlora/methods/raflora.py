"""raFLoRA (arXiv 2602.13486): the average of products, term by term over those who hold it.

``W = sum_k sum_{j <= r_k} (n_k / N_j) B_k[:, j] A_k[j]`` with ``N_j`` the examples of the
clients of rank j or more; one SVD; a client of rank r starts from the first r terms. RB-LoRA
(Findings of EACL 2026) weights term j of client k by ``p_k N / N_j``, which is the same.
FlexLoRA divides by all clients instead, so that without gradients a term that a share q of
them holds shrinks by q in every round.

From the abstract and a third-party implementation (unverified: the paper's own figures).

Differs: terms that no client of the round holds are carried over from the last global
adapter (``carry``); the third-party code drops them. The singular values go to ``B``, where
that code gives each factor their square root: a term that nobody has trained yet has the value
zero, and would have no gradient for ever.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from flexlora.lowrank import Accuracy, Factors, Split
from flexlora.method import (
    Decomposing,
    Method,
    State,
    Upload,
    Weighted,
    Weights,
    rank_wise,
    weighted,
)


@dataclass(frozen=True)
class RaFLoRA(Method):
    """raFLoRA, which is also RB-LoRA's aggregate."""

    title = "raFLoRA: products averaged rank by rank, redistributed by SVD"
    paper = "arXiv 2602.13486"
    exact = True
    rank_wise = True
    mixed_ranks = True
    by_module = True
    product = True
    up = "r*(m+n)"
    down = "r*(m+n)"
    server = "one SVD of rank S"

    split: Split = "left"
    weights: Weights = "examples"
    carry: bool = True
    precision: Literal["float64", "float32"] = "float64"
    accuracy: Accuracy = "bounded"

    def aggregate(self, state: State, uploads: Sequence[Upload]) -> State:
        """The rank-wise mean of products as an SVD; costs what FlexLoRA's costs."""
        held, known = weighted(uploads, self.weights), state.adapters["global"]

        def terms(module: str) -> list[Weighted]:
            each, last = held(module), known[module]
            most = max(f.rank for _, f in each)
            found = [
                (1.0, Factors(f.B.double() * share, f.A.double()))
                for share, (_, f) in zip(rank_wise(each), each, strict=True)
            ]
            if self.carry and most < last.rank:
                found.append((1.0, last.terms(range(most, last.rank))))
            return found

        how = Decomposing(self.split, self.precision, self.accuracy)
        adapter, facts = how.best(terms, known, state.facts["ranks"])
        return State({"global": adapter}, {**state.facts, **facts})
