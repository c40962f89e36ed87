"""The full SVD of the full matrix, by LAPACK."""

from __future__ import annotations

import torch
from torch import Tensor

from flexlora.lowrank.svd import SVD, Matrix, signs

SVD_WEIGHT = 30.0
"""The cost of LAPACK's divide and conquer (gesdd, with vectors) for a matrix (p, q), p <= q, in
units of p p q matrix-product flops. Measured in float32 on two cores: 29 at 1340 x 1340, 29 at
4096 x 4096, 39 at 4096 x 11008."""


def cost(matrix: Matrix, rank: int) -> float:
    """The time of this route, as the flops of a matrix product that takes equally long."""
    out, in_ = matrix.shape
    forming = 0 if isinstance(matrix, Tensor) else 2 * out * in_ * matrix.rank
    return forming + SVD_WEIGHT * min(out, in_) * out * in_


def svd(matrix: Matrix, rank: int) -> SVD:
    """All singular values and the first ``rank`` singular vectors; O(out in min(out, in))."""
    full = matrix if isinstance(matrix, Tensor) else matrix.B @ matrix.A
    U, S, Vt = torch.linalg.svd(full, full_matrices=False)
    # Copies: views would keep all vectors in memory.
    U, Vt = U[:, :rank].clone(), Vt[:rank].clone()
    sign = signs(Vt.T)
    return SVD(U * sign, S, Vt * sign[:, None], route="dense")
