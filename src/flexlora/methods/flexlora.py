"""FlexLoRA (arXiv 2402.11505): average the products, hand out truncated SVDs.

``W = sum_k p_k B_k A_k`` over the cohort, ``p_k`` the client's share of the examples; one
SVD per module; a client of rank r starts from the best rank-r approximation (section 3.2).
The aggregate replaces the last one. With SGD on the clients this is the paper's
FedAvg + FlexLoRA, with AdamW its FedIT + FlexLoRA.

Differs: the product is never formed but decomposed through QR of the stacked factors; the
server keeps the terms up to the largest rank that any client can be handed. A client whose
rank exceeds that of the aggregate gets fresh trainable terms, where the paper's code hands
out arbitrary null vectors with zero singular values: the product is the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from flexlora.adapter import Adapter, Factors
from flexlora.linalg import LowRankSum, Split
from flexlora.method import Method, State, Upload, shares


@dataclass(frozen=True)
class FlexLoRA(Method):
    """FlexLoRA. ``split`` says which factor takes the singular values (the paper: left)."""

    title = "FlexLoRA: average of products, redistributed by SVD"
    paper = "arXiv 2402.11505"
    exact = True
    mixed_ranks = True

    split: Split = "left"
    weights: Literal["examples", "uniform"] = "examples"
    precision: Literal["float64", "float32"] = "float64"

    def aggregate(self, state: State, uploads: Sequence[Upload]) -> State:
        """The mean of products as an SVD, module by module; O((out + in) s^2) for summed rank s."""
        by_examples = self.weights == "examples"
        weights = shares([u.examples if by_examples else 1 for u in uploads])
        known = state.adapters["global"]
        modules: dict[str, Factors] = {}
        lost: dict[str, float] = {}
        for module, rank in state.facts["ranks"].items():
            total = LowRankSum.of(
                (p, u.adapter[module]) for p, u in zip(weights, uploads, strict=True)
            )
            svd = total.svd(rank, getattr(torch, self.precision))
            modules[module] = svd.factors(rank, self.split).to(known[module].B.dtype)
            lost[module] = 1 - svd.energy(rank)
        return State({"global": Adapter(modules)}, {**state.facts, "lost_energy": lost})
