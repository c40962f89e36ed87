"""A truncated singular value decomposition, and the matrices it is computed from.

The routes that compute one are in ``routes/``; ``decomposition`` chooses among them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from flexlora.errors import AdapterError
from flexlora.lowrank.factors import Factors

Matrix = Factors | Tensor
"""A matrix (out, in), given as a pair of factors or as a dense tensor."""

Split = Literal["left", "balanced"]
"""Where the singular values go: ``left`` B = U S and A = V', ``balanced`` sqrt(S) to each."""


@dataclass(frozen=True, eq=False)
class SVD:
    """The leading part of a singular value decomposition ``U diag(S) Vt``.

    ``U`` is (out, pairs) and ``Vt`` (pairs, in). ``S`` (at least ``pairs`` values) contains
    singular values in descending order, including some without vectors, so that the lost
    energy (squared singular values) can be computed; an exact route has all of them.
    ``beyond`` is the squared Frobenius norm outside the values of ``S``: zero from an exact
    route, an unbiased estimate from ``krylov``. The entry of largest modulus of each right
    singular vector is positive, so that equal matrices give equal vectors.

    ``route`` names the file that computed it. ``excess`` bounds the error above the optimum:
    for every r up to ``pairs``, ``||W - W_r||_F <= (1 + excess) min ||W - X||_F`` over all X
    of rank r; zero stands for "exact to rounding". If ``krylov`` was tried and rejected before
    an exact route was taken, ``refused`` is the excess that it reached: infinite if it could
    not show a bound.
    """

    U: Tensor
    S: Tensor
    Vt: Tensor
    beyond: float = 0.0
    route: Literal["qr", "dense", "krylov"] = "dense"
    excess: float = 0.0
    refused: float | None = None

    @property
    def pairs(self) -> int:
        """The number of pairs of singular vectors."""
        return self.U.shape[1]

    def energy(self, rank: int) -> float:
        """The share of the squared Frobenius norm in the best approximation of rank ``rank``.

        1.0 for the zero matrix.
        """
        squares = self.S.double().square()
        total = float(squares.sum()) + self.beyond
        return float(squares[:rank].sum()) / total if total > 0 else 1.0

    def rank_for(self, energy: float) -> int:
        """The smallest rank, at least 1, that keeps this share of the squared Frobenius norm.

        Raises:
            AdapterError: the share is not in (0, 1], or the values of ``S`` do not reach it.
        """
        if not 0 < energy <= 1:
            raise AdapterError(f"The energy share is {energy}; give a number in (0, 1].")
        squares = self.S.double().square()
        total = float(squares.sum()) + self.beyond
        if total == 0:
            return 1
        # Rounding of the cumulative sum must not push energy 1.0 past the numerical rank.
        reached = squares.cumsum(0) >= energy * total * (1 - 1e-14)
        if not reached.any():
            raise AdapterError(
                f"The first {len(squares)} singular values have less than {energy} of the "
                "energy; decompose with accuracy='exact'."
            )
        return int(reached.int().argmax()) + 1

    def factors(self, rank: int, split: Split = "left") -> Factors:
        """The best approximation of rank ``rank`` (Eckart and Young) as factors.

        If there are fewer pairs than ``rank``, the factors have that lower rank.
        """
        rank = min(rank, self.pairs)
        U, S, Vt = self.U[:, :rank], self.S[:rank], self.Vt[:rank]
        if split == "left":
            return Factors(U * S, Vt)
        root = S.sqrt()
        return Factors(U * root, root[:, None] * Vt)


def times(matrix: Matrix, X: Tensor) -> Tensor:
    """``matrix @ X`` for X (in, columns); the product of a pair of factors is never formed."""
    return matrix @ X if isinstance(matrix, Tensor) else matrix.B @ (matrix.A @ X)


def transposed(matrix: Matrix) -> Matrix:
    """The transpose, without a copy."""
    return matrix.T if isinstance(matrix, Tensor) else Factors(matrix.A.T, matrix.B.T)


def parts(matrix: Matrix) -> tuple[Tensor, ...]:
    """The tensors of a matrix: itself if dense, else the two factors."""
    return (matrix,) if isinstance(matrix, Tensor) else (matrix.B, matrix.A)


def signs(V: Tensor) -> Tensor:
    """For each column of V (rows, columns) the sign that makes its largest entry positive.

    Largest in modulus; the result is (columns,).
    """
    if V.shape[1] == 0:
        return V.new_ones(0)
    peaks = V.gather(0, V.abs().argmax(dim=0, keepdim=True))[0]
    return torch.where(peaks < 0, -1.0, 1.0).to(V.dtype)
