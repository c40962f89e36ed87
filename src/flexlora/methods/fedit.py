"""FedIT (arXiv 2305.05644): FedAvg on the factors, each for itself.

``B = sum_k p_k B_k`` and ``A = sum_k p_k A_k``. Inexact: the product misses the mean of the
products by the covariance of the factors, and clients of different ranks cannot take part.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from flexlora.lowrank import Adapter
from flexlora.method import Cohort, Feature, Info, Mean, Method, RoundContext, State, Weights


@dataclass(frozen=True)
class FedIT(Method):
    """FedIT: the weighted mean of B and of A. Unequal ranks are refused at start-up."""

    info = Info(
        "FedIT: FedAvg on the factors",
        "arXiv 2305.05644",
        up="r*(m+n)",
        down="r*(m+n)",
        server="sums of factors",
    )
    features = frozenset({Feature.PER_MODULE, Feature.COMMON_FACTORS, Feature.SAME_FOR_EQUAL_RANKS})
    needs = frozenset({Mean.FACTORS})

    weights: Weights = "examples"

    def aggregate(self, state: State, cohort: Cohort, context: RoundContext) -> State:
        """The mean of each factor; O(K rank (out + in)) for K uploads."""
        model = {m: cohort.factors(m).to(last.B.dtype) for m, last in state.model.items()}
        return replace(state, model=Adapter(model))
