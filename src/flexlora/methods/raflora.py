"""raFLoRA (arXiv 2602.13486): the average of products, component by component over those that have
it.

``W = sum_k sum_{j <= r_k} (n_k / N_j) B_k[:, j] A_k[j]`` with ``N_j`` the examples of the
clients of rank j or more; one SVD; a client of rank r starts from the first r components. RB-LoRA
(Findings of EACL 2026) weights component j of client k by ``p_k N / N_j``, which is the same.
FlexLoRA divides by all clients instead, so that without gradients a component that a share q of
them has shrinks by q in every round.

From the abstract and a third-party implementation (unverified: the paper's own figures).

Differs: components that no client of the round has are carried over from the last global adapter
(``carry``); the third-party code drops them. The singular values go to ``B``, where that code
gives each factor their square root: a component that no client has trained yet has the value zero,
and would have no gradient for ever.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from flexlora.lowrank import Accuracy, Split
from flexlora.method import (
    Cohort,
    Feature,
    Info,
    Mean,
    Method,
    RoundContext,
    State,
    Truncation,
    Weighted,
    Weights,
)


@dataclass(frozen=True)
class RaFLoRA(Method):
    """raFLoRA, which is also RB-LoRA's aggregate."""

    info = Info(
        "raFLoRA: products averaged rank by rank, redistributed by SVD",
        "arXiv 2602.13486",
        exact=True,
        by_component=True,
        up="r*(m+n)",
        down="r*(m+n)",
        server="one SVD of rank S",
        exempt={"gauge": "components are averaged one by one"},
    )
    features = frozenset(
        {
            Feature.MIXED_RANKS,
            Feature.PER_MODULE,
            Feature.PRODUCT_STATE,
            Feature.SAME_FOR_EQUAL_RANKS,
        }
    )
    needs = frozenset({Mean.PRODUCTS_BY_COMPONENT})

    split: Split = "left"
    weights: Weights = "examples"
    carry: bool = True
    precision: Literal["float64", "float32"] = "float64"
    accuracy: Accuracy = "bounded"

    @property
    def truncation(self) -> Truncation:
        """As the fields say."""
        return Truncation(self.split, self.precision, self.accuracy)

    def aggregate(self, state: State, cohort: Cohort, context: RoundContext) -> State:
        """The mean of products by component as an SVD; costs what FlexLoRA's costs."""

        def terms(module: str) -> list[Weighted]:
            most, last = max(cohort.ranks(module).values()), state.model[module]
            summed = list(cohort.products_by_component(module).terms)
            if self.carry and most < last.rank:
                summed.append((1.0, last.components(range(most, last.rank))))
            return summed

        result = self.truncation.best(terms, state.model, context.ranks)
        return replace(state, model=result.adapter, per_module=result.per_module)
