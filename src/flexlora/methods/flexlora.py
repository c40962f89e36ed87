"""FlexLoRA (arXiv 2402.11505): average the products, hand out truncated SVDs.

``W = sum_k p_k B_k A_k`` over the cohort, ``p_k`` the client's share of the examples; one
SVD per module; a client of rank r starts from the best rank-r approximation (section 3.2).
The aggregate replaces the last one. With SGD on the clients this is the paper's
FedAvg + FlexLoRA, with AdamW its FedIT + FlexLoRA.

Differs: the product is formed only where it is smaller than its factors, and decomposed by
the cheapest route; the server keeps the components up to the largest rank of any client.
A client whose rank exceeds that of the aggregate gets fresh trainable components, where
the paper's code hands out arbitrary null vectors with zero singular values: the product is
the same.
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
    Weights,
)


@dataclass(frozen=True)
class FlexLoRA(Method):
    """FlexLoRA. ``split`` says which factor takes the singular values (the paper: left).

    ``precision`` and ``accuracy`` are those of ``aggregation.Decomposing``.
    """

    info = Info(
        "FlexLoRA: average of products, redistributed by SVD",
        "arXiv 2402.11505",
        exact=True,
        up="r*(m+n)",
        down="r*(m+n)",
        server="one SVD of rank S",
    )
    features = frozenset(
        {
            Feature.MIXED_RANKS,
            Feature.PER_MODULE,
            Feature.PRODUCT_STATE,
            Feature.SAME_FOR_EQUAL_RANKS,
        }
    )
    needs = frozenset({Mean.PRODUCTS})

    split: Split = "left"
    weights: Weights = "examples"
    precision: Literal["float64", "float32"] = "float64"
    accuracy: Accuracy = "bounded"

    @property
    def truncation(self) -> Truncation:
        """As the fields say."""
        return Truncation(self.split, self.precision, self.accuracy)

    def aggregate(self, state: State, cohort: Cohort, context: RoundContext) -> State:
        """The mean of products as an SVD, one module on each thread.

        ``State.per_module`` says what energy each module lost and how it was decomposed.
        """
        result = self.truncation.best(
            lambda module: cohort.product_terms(module, context.ranks[module]),
            state.model,
            context.ranks,
        )
        return replace(state, model=result.adapter, per_module=result.per_module)
