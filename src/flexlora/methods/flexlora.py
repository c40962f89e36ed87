"""FlexLoRA (arXiv 2402.11505): average the products, hand out truncated SVDs.

``W = sum_k p_k B_k A_k`` over the cohort, ``p_k`` the client's share of the examples; one
SVD per module; a client of rank r starts from the best rank-r approximation (section 3.2).
The aggregate replaces the last one. With SGD on the clients this is the paper's
FedAvg + FlexLoRA, with AdamW its FedIT + FlexLoRA.

Differs: the product is formed only where it is smaller than its factors, and decomposed by
the cheapest route; the server keeps the terms up to the largest rank that any client can be
handed. A client whose rank exceeds that of the aggregate gets fresh trainable terms, where
the paper's code hands out arbitrary null vectors with zero singular values: the product is
the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from flexlora.lowrank import Accuracy, Split
from flexlora.method import Decomposing, Method, State, Upload, Weights, weighted


@dataclass(frozen=True)
class FlexLoRA(Method):
    """FlexLoRA. ``split`` says which factor takes the singular values (the paper: left).

    ``precision`` and ``accuracy`` are those of ``aggregation.Decomposing``.
    """

    title = "FlexLoRA: average of products, redistributed by SVD"
    paper = "arXiv 2402.11505"
    exact = True
    mixed_ranks = True
    by_module = True
    product = True
    up = "r*(m+n)"
    down = "r*(m+n)"
    server = "one SVD of rank S"

    split: Split = "left"
    weights: Weights = "examples"
    precision: Literal["float64", "float32"] = "float64"
    accuracy: Accuracy = "bounded"

    def aggregate(self, state: State, uploads: Sequence[Upload]) -> State:
        """The mean of products as an SVD, module by module, one module on each thread.

        The facts say of each module what energy was lost and how it was decomposed.
        """
        terms = weighted(uploads, self.weights)

        how = Decomposing(self.split, self.precision, self.accuracy)
        adapter, facts = how.best(terms, state.adapters["global"], state.facts["ranks"])
        return State({"global": adapter}, {**state.facts, **facts})
