"""What a truncated singular value decomposition is, and of what: a product or a dense matrix.

The routes that compute one stand in ``decompositions/``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from flexlora.errors import AdapterError
from flexlora.lowrank.factors import Factors

Matrix = Factors | Tensor
"""A matrix (out, in): as a product that stays factored, or dense."""

Split = Literal["left", "balanced"]
"""Where the singular values go: ``left`` B = U S and A = V', ``balanced`` sqrt(S) to each."""


@dataclass(frozen=True, eq=False)
class SVD:
    """The leading part of a singular value decomposition ``U diag(S) Vt``.

    ``U`` is (out, kept), ``Vt`` (kept, in). ``S`` holds singular values in descending
    order, also those whose vectors were not kept, so that the energy lost is known; an
    exact route has them all. ``beyond`` is the squared norm of what lies outside the values
    of ``S``: zero from an exact route, an unbiased estimate from ``krylov``. Of each right
    vector the entry of largest modulus is positive, so that equal matrices give equal
    vectors.

    ``route`` names the file that made it. ``excess`` bounds the error above the optimum:
    for every r up to ``kept``, ``||W - W_r||_F <= (1 + excess) min ||W - X||_F`` over all X
    of rank r; zero says "exact to rounding". ``refused`` is the excess at which ``krylov``
    was given up before the exact route was taken, if it was tried: infinite if none was shown.
    """

    U: Tensor
    S: Tensor
    Vt: Tensor
    beyond: float = 0.0
    route: Literal["qr", "dense", "krylov"] = "dense"
    excess: float = 0.0
    refused: float | None = None

    @property
    def kept(self) -> int:
        """How many pairs of vectors are held."""
        return self.U.shape[1]

    def energy(self, rank: int) -> float:
        """The share of the squared Frobenius norm that the best rank-``rank`` part holds.

        1.0 for the zero matrix, of which nothing can be lost.
        """
        squares = self.S.double().square()
        total = float(squares.sum()) + self.beyond
        return float(squares[:rank].sum()) / total if total > 0 else 1.0

    def rank_for(self, energy: float) -> int:
        """The smallest rank that keeps at least this share of the squared Frobenius norm.

        At least 1, so that there is something to store.

        Raises:
            AdapterError: the share is not in (0, 1], or more than the values of ``S`` hold.
        """
        if not 0 < energy <= 1:
            raise AdapterError(f"An energy share lies in (0, 1], got {energy}.")
        squares = self.S.double().square()
        total = float(squares.sum()) + self.beyond
        if total == 0:
            return 1
        # Rounding of the running sum must not push energy 1.0 past the numerical rank.
        reached = squares.cumsum(0) >= energy * total * (1 - 1e-14)
        if not reached.any():
            raise AdapterError(
                f"The {len(squares)} singular values known hold less than {energy} of the "
                "energy; decompose by an exact route."
            )
        return int(reached.int().argmax()) + 1

    def factors(self, rank: int, split: Split = "left") -> Factors:
        """The best approximation of rank ``rank`` (Eckart and Young) as factors.

        Zero terms are never appended: with fewer pairs held, fewer are returned.
        """
        rank = min(rank, self.kept)
        U, S, Vt = self.U[:, :rank], self.S[:rank], self.Vt[:rank]
        if split == "left":
            return Factors(U * S, Vt)
        root = S.sqrt()
        return Factors(U * root, root[:, None] * Vt)


def times(matrix: Matrix, X: Tensor) -> Tensor:
    """``matrix @ X``; a product's own product is never formed."""
    return matrix @ X if isinstance(matrix, Tensor) else matrix.B @ (matrix.A @ X)


def transposed(matrix: Matrix) -> Matrix:
    """The transpose, without a copy."""
    return matrix.T if isinstance(matrix, Tensor) else Factors(matrix.A.T, matrix.B.T)


def parts(matrix: Matrix) -> tuple[Tensor, ...]:
    """The tensors that hold it: one, or the two factors."""
    return (matrix,) if isinstance(matrix, Tensor) else (matrix.B, matrix.A)


def signs(V: Tensor) -> Tensor:
    """For each column the sign that makes its entry of largest modulus positive."""
    if V.shape[1] == 0:
        return V.new_ones(0)
    peaks = V.gather(0, V.abs().argmax(dim=0, keepdim=True))[0]
    return torch.where(peaks < 0, -1.0, 1.0).to(V.dtype)
