"""FedIT (arXiv 2305.05644): FedAvg on the factors, each for itself.

``B = sum_k p_k B_k`` and ``A = sum_k p_k A_k``. Inexact: the product misses the mean of the
products by the covariance of the factors, and clients of different ranks cannot take part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flexlora.lowrank import Adapter
from flexlora.method import Method, State, Upload, Weights, factor_means, weighted


@dataclass(frozen=True)
class FedIT(Method):
    """FedIT: the weighted mean of B and of A. Unequal ranks are refused at start-up."""

    title = "FedIT: FedAvg on the factors"
    paper = "arXiv 2305.05644"
    exact = False
    mixed_ranks = False
    by_module = True
    fixed_frame = True
    up = "r*(m+n)"
    down = "r*(m+n)"
    server = "sums of factors"

    weights: Weights = "examples"

    def aggregate(self, state: State, uploads: Sequence[Upload]) -> State:
        """The mean of each factor; O(K rank (out + in)) for K uploads."""
        held = weighted(uploads, self.weights)
        modules = {
            module: factor_means(held(module)).to(last.B.dtype)
            for module, last in state.adapters["global"].items()
        }
        return State({"global": Adapter(modules)}, state.facts)
