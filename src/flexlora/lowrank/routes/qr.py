"""Two thin QR decompositions of the factors, and the SVD of the small product of their R.

``B A = Q_B (R_B R_A') Q_A'`` with ``B = Q_B R_B`` and ``A' = Q_A R_A``. The orthogonal factors
stay Householder reflectors and are applied to the leading vectors, never formed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from flexlora.lowrank.factors import Factors
from flexlora.lowrank.routes.dense import SVD_WEIGHT
from flexlora.lowrank.svd import SVD, Matrix, signs

QR_WEIGHT = 1.5
"""How much slower geqrf and ormqr run than a matrix product of the same flops (float32, two
cores, 4096 x 1340: 116 against 180 GFLOP/s)."""


def cost(matrix: Matrix, rank: int) -> float:
    """The time of this route, as the flops of a matrix product that takes equally long.

    Infinite for a dense matrix, and if the rank is not smaller than the matrix.
    """
    if isinstance(matrix, Tensor) or matrix.rank >= min(matrix.shape):
        return math.inf
    long, s = sum(matrix.shape), matrix.rank
    return QR_WEIGHT * (2 * long * s**2 + 4 * long * s * rank) + SVD_WEIGHT * s**3


def svd(factors: Factors, rank: int) -> SVD:
    """All singular values and the first ``rank`` singular vectors.

    Cost O((out + in) s^2 + s^3), s being the rank of the factors.
    """
    left, right = TallQR.of(factors.B), TallQR.of(factors.A.T)
    U, S, Vt = torch.linalg.svd(left.R @ right.R.T, full_matrices=False)
    U, V = left.expand(U[:, :rank]), right.expand(Vt[:rank].T)
    sign = signs(V)
    return SVD(U * sign, S, (V * sign).T, route="qr")


@dataclass(frozen=True, eq=False)
class TallQR:
    """A tall matrix (rows, s) as Q R: R is (s, s), Q (rows, s) stays Householder reflectors."""

    R: Tensor
    rows: int
    reflectors: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, tall: Tensor) -> TallQR:
        """The decomposition of ``tall``, by LAPACK's geqrf."""
        packed, tau = torch.geqrf(tall)
        return cls(packed[: tall.shape[1]].triu(), tall.shape[0], (packed, tau))

    def expand(self, small: Tensor) -> Tensor:
        """``Q @ small`` (rows, columns) for small (s, columns)."""
        tall = torch.nn.functional.pad(small, (0, 0, 0, self.rows - small.shape[0]))
        return torch.ormqr(*self.reflectors, tall)
