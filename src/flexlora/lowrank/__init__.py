"""Low-rank algebra: factor pairs, their weighted sums, and truncated SVDs of those sums."""

from flexlora.lowrank.change import Way, between, parameter_change
from flexlora.lowrank.decomposition import Accuracy, decompose
from flexlora.lowrank.distance import product_change
from flexlora.lowrank.factors import Adapter, FactorNames, Factors
from flexlora.lowrank.gram import cosines, norms, parameter_gram, product_gram, squared_distances
from flexlora.lowrank.parametrization import Parametrization, as_vector
from flexlora.lowrank.sums import Accumulator, LowRankSum, norm, normalized
from flexlora.lowrank.svd import SVD, Split

__all__ = [
    "SVD",
    "Accumulator",
    "Accuracy",
    "Adapter",
    "FactorNames",
    "Factors",
    "LowRankSum",
    "Parametrization",
    "Split",
    "Way",
    "as_vector",
    "between",
    "cosines",
    "decompose",
    "norm",
    "normalized",
    "norms",
    "parameter_change",
    "parameter_gram",
    "product_change",
    "product_gram",
    "squared_distances",
]
