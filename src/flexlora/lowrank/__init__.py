"""Low-rank algebra: factor pairs, their weighted sums, and truncated SVDs of those sums."""

from flexlora.lowrank.decomposition import Accuracy, decompose
from flexlora.lowrank.factors import Adapter, Factors, Halves
from flexlora.lowrank.parametrization import Form, column
from flexlora.lowrank.sums import Accumulator, LowRankSum, norm, normalized
from flexlora.lowrank.svd import SVD, Split

__all__ = [
    "SVD",
    "Accumulator",
    "Accuracy",
    "Adapter",
    "Factors",
    "Form",
    "Halves",
    "LowRankSum",
    "Split",
    "column",
    "decompose",
    "norm",
    "normalized",
]
