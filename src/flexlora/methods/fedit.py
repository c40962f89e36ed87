"""FedIT (arXiv 2305.05644): FedAvg on the factors, each for itself.

``B = sum_k p_k B_k`` and ``A = sum_k p_k A_k``. Inexact: the product misses the mean of the
products by the covariance of the factors, and clients of different ranks cannot take part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flexlora import linalg
from flexlora.adapter import Adapter
from flexlora.method import Method, State, Upload


@dataclass(frozen=True)
class FedIT(Method):
    """FedIT: the example-weighted mean of B and of A."""

    title = "FedIT: FedAvg on the factors"
    paper = "arXiv 2305.05644"
    exact = False
    mixed_ranks = False

    def aggregate(self, state: State, uploads: Sequence[Upload]) -> State:
        """The mean of each factor; O(K rank (out + in)) for K uploads."""
        return State(
            {
                "global": Adapter(
                    {
                        module: linalg.mean([(u.examples, u.adapter[module]) for u in uploads]).to(
                            last.B.dtype
                        )
                        for module, last in state.adapters["global"].items()
                    }
                )
            },
            state.facts,
        )
