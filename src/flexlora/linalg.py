"""The algebra of low-rank sums: stack, truncate, measure, without the full-size matrix.

Everything here works on factors. Nothing of the size out x in is made while the summed
rank is below ``min(out, in)``; above it the factors are no longer the smaller form.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from flexlora.adapter import Factors

Split = Literal["left", "balanced"]
"""Where the singular values go: ``left`` B = U S and A = V', ``balanced`` sqrt(S) to each."""


@dataclass(frozen=True, eq=False)
class SVD:
    """The leading part of a singular value decomposition ``U diag(S) Vt``.

    ``U`` is (out, kept), ``Vt`` (kept, in). ``S`` holds *all* singular values in
    descending order, also those whose vectors were not kept, so that the energy lost is
    known. Of each right vector the entry of largest modulus is positive, so that equal
    matrices give equal vectors.
    """

    U: Tensor
    S: Tensor
    Vt: Tensor

    @property
    def kept(self) -> int:
        """How many pairs of vectors are held."""
        return self.U.shape[1]

    def energy(self, rank: int) -> float:
        """The share of the squared Frobenius norm that the best rank-``rank`` part holds.

        1.0 for the zero matrix, of which nothing can be lost.
        """
        squares = self.S.double().square()
        total = squares.sum()
        return float(squares[:rank].sum() / total) if total > 0 else 1.0

    def rank_for(self, energy: float) -> int:
        """The smallest rank that keeps at least this share of the squared Frobenius norm.

        At least 1, so that there is something to store.

        Raises:
            ValueError: the share is not in (0, 1].
        """
        if not 0 < energy <= 1:
            raise ValueError(f"An energy share lies in (0, 1], got {energy}.")
        squares = self.S.double().square()
        total = float(squares.sum())
        if total == 0:
            return 1
        # Rounding of the running sum must not push energy 1.0 past the numerical rank.
        reached = squares.cumsum(0) >= energy * total * (1 - 1e-14)
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


@dataclass(frozen=True, eq=False)
class LowRankSum:
    """The weighted sum ``sum_i w_i B_i A_i`` of factors of one shape, held as its terms.

    Raises:
        ValueError: there are no terms, or two differ in shape.
    """

    terms: tuple[tuple[float, Factors], ...]

    def __post_init__(self) -> None:
        if not self.terms:
            raise ValueError("A sum needs at least one term, to know its shape.")
        shapes = {factors.shape for _, factors in self.terms}
        if len(shapes) > 1:
            raise ValueError(f"Cannot add factors of different shapes (out, in): {shapes}.")

    @classmethod
    def of(cls, weighted: Iterable[tuple[float, Factors]]) -> LowRankSum:
        """The sum of (weight, factors) pairs, in their order."""
        return cls(tuple(weighted))

    @property
    def shape(self) -> tuple[int, int]:
        """The shape (out, in) of the sum."""
        return self.terms[0][1].shape

    @property
    def rank(self) -> int:
        """The summed rank of the terms, which bounds the rank of the sum."""
        return sum(factors.rank for _, factors in self.terms)

    def __add__(self, other: LowRankSum) -> LowRankSum:
        return LowRankSum(self.terms + other.terms)

    def __sub__(self, other: LowRankSum) -> LowRankSum:
        return self + other.scaled(-1.0)

    def scaled(self, factor: float) -> LowRankSum:
        """The sum times a number."""
        return LowRankSum(tuple((factor * weight, f) for weight, f in self.terms))

    def stacked(self, dtype: torch.dtype | None = None) -> Factors:
        """One pair of factors of the summed rank with the same product, exactly.

        The weights go to ``A`` alone: on both sides they would be squared.
        """
        dtype = dtype or self.terms[0][1].B.dtype
        B = torch.cat([f.B.to(dtype) for _, f in self.terms], dim=1)
        A = torch.cat([weight * f.A.to(dtype) for weight, f in self.terms], dim=0)
        return Factors(B, A)

    def svd(self, rank: int | None = None, dtype: torch.dtype = torch.float64) -> SVD:
        """The singular value decomposition, with the vectors of the first ``rank`` values.

        Two thin QR decompositions of the stacked factors and an SVD of the small product
        of their triangles: O((out + in) s^2 + s^3) for a summed rank s, against
        O(out in min(out, in)) for the dense matrix, which is taken once s reaches
        min(out, in) and is the smaller form.

        Raises:
            ValueError: a factor holds NaN or infinity.
        """
        stacked = self.stacked(dtype)
        if not (stacked.B.isfinite().all() and stacked.A.isfinite().all()):
            raise ValueError("Cannot decompose factors that hold NaN or infinity.")
        left, right = _sides(stacked)
        U, S, Vt = torch.linalg.svd(left.R @ right.R.T, full_matrices=False)
        kept = len(S) if rank is None else min(rank, len(S))
        U, V = left.expand(U[:, :kept]), right.expand(Vt[:kept].T)
        sign = _signs(V)
        return SVD(U * sign, S, (V * sign).T)

    def norm(self) -> float:
        """The Frobenius norm, by QR in float64.

        Terms that cancel are safe here; the Gram identity tr((B'B)(AA')) loses half the
        digits, and all of them in float32.
        """
        stacked = self.stacked(torch.float64)
        left, right = _sides(stacked)
        return float(torch.linalg.matrix_norm(left.R @ right.R.T))

    def inner(self, other: LowRankSum) -> float:
        """The Frobenius inner product with another sum, by one QR of both, in float64."""
        both = (self + other).stacked(torch.float64)
        left, right = _sides(both)
        s = self.rank
        mine = left.R[:, :s] @ right.R[:, :s].T
        theirs = left.R[:, s:] @ right.R[:, s:].T
        return float((mine * theirs).sum())


@dataclass(frozen=True, eq=False)
class _Side:
    """A tall matrix (rows, s) as Q R, with Q kept as Householder reflectors, never formed."""

    R: Tensor
    rows: int
    reflectors: tuple[Tensor, Tensor] | None

    @classmethod
    def of(cls, tall: Tensor) -> _Side:
        packed, tau = torch.geqrf(tall)
        return cls(packed[: tall.shape[1]].triu(), tall.shape[0], (packed, tau))

    def expand(self, small: Tensor) -> Tensor:
        """``Q @ small``."""
        if self.reflectors is None:
            return small
        tall = torch.nn.functional.pad(small, (0, 0, 0, self.rows - small.shape[0]))
        return torch.ormqr(*self.reflectors, tall)


def _sides(stacked: Factors) -> tuple[_Side, _Side]:
    """``B`` and ``A'`` as Q R, or as they are where that would not make them smaller."""
    B, A_t = stacked.B, stacked.A.T
    if stacked.rank >= min(stacked.shape):
        return _Side(B, B.shape[0], None), _Side(A_t, A_t.shape[0], None)
    return _Side.of(B), _Side.of(A_t)


def _signs(V: Tensor) -> Tensor:
    """For each column the sign that makes its entry of largest modulus positive."""
    if V.shape[1] == 0:
        return V.new_ones(0)
    peaks = V.gather(0, V.abs().argmax(dim=0, keepdim=True))[0]
    return torch.where(peaks < 0, -1.0, 1.0).to(V.dtype)


def norm(factors: Factors) -> float:
    """The Frobenius norm of ``B @ A``, by QR in float64."""
    return LowRankSum.of([(1.0, factors)]).norm()


def mean(weighted: Sequence[tuple[float, Factors]]) -> Factors:
    """The weighted mean of ``B`` and of ``A``, each for itself (all of one rank), in float64.

    This is FedIT's average (arXiv 2305.05644): its product is *not* the mean of the
    products; the difference is the covariance of the factors.
    """
    total = sum(weight for weight, _ in weighted)
    B = torch.stack([weight * f.B.double() for weight, f in weighted]).sum(0) / total
    A = torch.stack([weight * f.A.double() for weight, f in weighted]).sum(0) / total
    return Factors(B, A)
