"""The routes to a truncated SVD, one file each, and the choice among them by their cost.

``qr`` and ``dense`` are exact to rounding. ``krylov`` comes with a computed bound on what
it loses against the optimum; a result whose bound is not met is never kept.
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
"""The largest error above the optimum, as a share of the optimum's, that is accepted."""

RISK = 1.5
"""How many times cheaper than the exact route ``krylov`` must promise to be before it is
tried: where its bound is not met, its work is lost."""


def decompose(
    matrix: Matrix,
    rank: int | None = None,
    accuracy: Accuracy = "exact",
    start: Factors | None = None,
) -> SVD:
    """The singular value decomposition, with the vectors of the first ``rank`` values.

    Computed in the precision and on the device of ``matrix`` by the cheapest route that is
    accurate enough (``cost`` of each file, in matrix-product flops); where ``krylov`` was
    tried and cannot show its bound, by the exact route. Equal input gives equal bytes.
    ``start`` is a guess, such as the last round's result: no bound rests on it.

    Raises:
        AdapterError: the matrix holds NaN or infinity.
    """
    # A finite norm acquits, at less cost; that of huge numbers may overflow.
    if not all(
        bool(torch.linalg.vector_norm(part).isfinite() or part.isfinite().all())
        for part in parts(matrix)
    ):
        raise AdapterError("Cannot decompose factors that hold NaN or infinity.")
    kept = min(matrix.shape) if rank is None else min(rank, *matrix.shape)
    exact = min(qr.cost(matrix, kept), dense.cost(matrix, kept))
    refused = None
    if accuracy == "bounded" and RISK * krylov.cost(matrix, kept) < exact:
        found = krylov.svd(matrix, kept, TOLERANCE, start)
        if found.excess <= TOLERANCE:
            return found
        refused = found.excess
    if isinstance(matrix, Factors) and qr.cost(matrix, kept) <= dense.cost(matrix, kept):
        return replace(qr.svd(matrix, kept), refused=refused)
    return replace(dense.svd(matrix, kept), refused=refused)
