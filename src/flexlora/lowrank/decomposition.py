"""The choice of a route to a truncated SVD by its cost.

The routes ``qr`` and ``dense`` are exact to rounding. ``krylov`` computes a bound on its error
relative to the optimum; a result that misses the bound is never used.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch

from flexlora.errors import AdapterError
from flexlora.lowrank.factors import Factors
from flexlora.lowrank.routes import dense, krylov, qr
from flexlora.lowrank.svd import SVD, Matrix, parts

Accuracy = Literal["bounded", "exact"]
"""``exact``: to rounding. ``bounded``: ``SVD.excess`` is at most ``TOLERANCE``."""

TOLERANCE = 1e-3
"""The largest accepted error above the optimum, relative to the optimum's error."""

RISK = 1.5
"""How many times cheaper than the exact route ``krylov`` must be estimated before it is tried:
if it misses its bound, its work is wasted."""


def decompose(
    matrix: Matrix,
    rank: int | None = None,
    accuracy: Accuracy = "exact",
    start: Factors | None = None,
) -> SVD:
    """The singular value decomposition, with the first ``rank`` singular vectors.

    Computed in the precision and on the device of ``matrix`` by the cheapest route that is
    accurate enough (``cost`` of each route, in flops of a matrix product); if ``krylov`` was
    tried and missed its bound, by the exact route. Equal input gives equal bytes. ``start``
    is an initial guess, such as the last round's result; no bound relies on it.

    Raises:
        AdapterError: the matrix contains NaN or infinity.
    """
    # A finite norm proves that all entries are finite, at less cost; that of huge numbers may
    # overflow.
    if not all(
        bool(torch.linalg.vector_norm(part).isfinite() or part.isfinite().all())
        for part in parts(matrix)
    ):
        raise AdapterError(
            "Cannot decompose factors that contain NaN or infinity; lower the learning rate of the "
            "training that produced them."
        )
    rank = min(matrix.shape) if rank is None else min(rank, *matrix.shape)
    exact = min(qr.cost(matrix, rank), dense.cost(matrix, rank))
    refused = None
    if accuracy == "bounded" and RISK * krylov.cost(matrix, rank) < exact:
        approximation = krylov.svd(matrix, rank, TOLERANCE, start)
        if approximation.excess <= TOLERANCE:
            return approximation
        refused = approximation.excess
    if isinstance(matrix, Factors) and qr.cost(matrix, rank) <= dense.cost(matrix, rank):
        return replace(qr.svd(matrix, rank), refused=refused)
    return replace(dense.svd(matrix, rank), refused=refused)
