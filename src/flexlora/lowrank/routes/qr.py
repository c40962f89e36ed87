"""Two thin QR decompositions of the factors and the SVD of the small product in between.

``B A = Q_B (R_B R_A') Q_A'`` with ``B = Q_B R_B`` and ``A' = Q_A R_A``. The orthogonal parts
stay Householder reflectors and are applied to the vectors kept, never formed.
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
"""How much slower geqrf and ormqr run than a matrix product of as many flops (float32, two
cores, 4096 x 1340: 116 against 180 GFLOP/s)."""


def cost(matrix: Matrix, rank: int) -> float:
    """The time this route takes, as the flops of a matrix product that takes as long.

    Infinite for a dense matrix, and where the summed rank is no smaller than the shape.
    """
    if isinstance(matrix, Tensor) or matrix.rank >= min(matrix.shape):
        return math.inf
    long, s = sum(matrix.shape), matrix.rank
    return QR_WEIGHT * (2 * long * s**2 + 4 * long * s * rank) + SVD_WEIGHT * s**3


def svd(factors: Factors, rank: int) -> SVD:
    """All singular values and the vectors of the first ``rank``; O((out + in) s^2 + s^3)."""
    left, right = Side.of(factors.B), Side.of(factors.A.T)
    U, S, Vt = torch.linalg.svd(left.R @ right.R.T, full_matrices=False)
    U, V = left.expand(U[:, :rank]), right.expand(Vt[:rank].T)
    sign = signs(V)
    return SVD(U * sign, S, (V * sign).T, route="qr")


@dataclass(frozen=True, eq=False)
class Side:
    """A tall matrix (rows, s) as Q R, with Q kept as Householder reflectors, never formed."""

    R: Tensor
    rows: int
    reflectors: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, tall: Tensor) -> Side:
        """The decomposition of ``tall``, by LAPACK's geqrf."""
        packed, tau = torch.geqrf(tall)
        return cls(packed[: tall.shape[1]].triu(), tall.shape[0], (packed, tau))

    def expand(self, small: Tensor) -> Tensor:
        """``Q @ small``."""
        tall = torch.nn.functional.pad(small, (0, 0, 0, self.rows - small.shape[0]))
        return torch.ormqr(*self.reflectors, tall)
