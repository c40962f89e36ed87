"""How far a product of factors is from another: cheap, and right also where terms cancel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter

import torch
from torch import Tensor

from flexlora.lowrank.factors import Factors
from flexlora.lowrank.sums import LowRankSum

ERROR = 1e-4
"""The largest relative error of a norm, as long as its errors of rounding are independent."""

ALIGNED_ERROR = 0.1
"""The same if all of them go in one direction, which takes factors that are made for it."""

SUMMED_ROWS = 2048
"""The most terms of an inner product that are added in the precision of the factors; the sums of
so many are added in float64."""

_PRECISIONS = (torch.float32, torch.float64)

NOTHING = 1e-13
"""A change below this share of its terms is rounding, and counts as none."""


@dataclass(frozen=True)
class ProductChange:
    """The Frobenius norm of ``B A - B0 A0``, and what comes with it.

    ``parameters`` is the norm of all that changed in ``B`` and ``A``, as one vector. ``cancels``
    is ``|B| |A| / |B A|``: about the root of the rank for trained factors, large where terms of
    ``B A`` cancel.
    """

    norm: float
    parameters: float
    cancels: float


def product_change(factors: Factors, start: Factors | None = None) -> ProductChange:
    """How far a product is from another, or from zero.

    The change is ``dB A + B0 dA``, whose terms are as small as itself where factors moved little.
    Gram matrices of float32 give its norm where they have the digits for it, those of float64
    elsewhere, and a QR decomposition where terms cancel, as hostile ones do. Factors in float64
    begin with the second. The relative error of all three numbers is below ``ERROR``, and below
    ``ALIGNED_ERROR`` whatever the factors are made for.

    Costs three matrix products of rank^2 (out + in), or one without a start.
    """
    norm = parameters = cancels = None
    is_double = torch.float64 in (factors.B.dtype, start.B.dtype if start else None)
    for dtype in _PRECISIONS[is_double:]:
        move = _Move.between(factors.to(dtype), None if start is None else start.to(dtype))
        grams = _Grams.of(move)
        norm = grams.norm() if norm is None else norm
        parameters = grams.parameters() if parameters is None else parameters
        cancels = grams.cancels(move) if cancels is None else cancels
        if norm is not None and parameters is not None and cancels is not None:
            return ProductChange(norm, parameters, cancels)
    return ProductChange(
        move.norm_by_qr() if norm is None else norm,
        move.parameters() if parameters is None else parameters,
        move.cancels_by_qr() if cancels is None else cancels,
    )


@dataclass(frozen=True)
class _Move:
    """The change ``dB A + B0 dA`` of the product ``B A``; without a start ``B0`` is (out, 0)."""

    factors: Factors
    start: Factors
    dB: Tensor
    dA: Tensor

    @classmethod
    def between(cls, factors: Factors, start: Factors | None) -> _Move:
        """With components of zero where one of the two has fewer."""
        if start is None:
            nothing = factors.first(0)
            return cls(factors, nothing, factors.B, nothing.A)
        if factors.rank != start.rank:
            rank = max(factors.rank, start.rank)
            factors, start = factors.padded(rank), start.padded(rank)
        return cls(factors, start, factors.B - start.B, factors.A - start.A)

    def parameters(self) -> float:
        """The norm of the change of ``B`` and ``A``, entry by entry."""
        return math.hypot(_length(self.dB), _length(self.dA if self.start.rank else self.factors.A))

    def norm_by_qr(self) -> float:
        """The norm of the change; zero if it is rounding.

        The difference of the two products has the smaller terms where a step of one factor meets
        large numbers in the other.
        """
        f, s = self.factors, self.start
        steps = [(1.0, Factors(self.dB, f.A)), (1.0, Factors(s.B, self.dA))]
        products = [(1.0, f), (-1.0, s)]
        size, terms = min(((_size(each), each) for each in (steps, products)), key=itemgetter(0))
        norm = LowRankSum.of(terms).norm()
        return norm if not norm <= NOTHING * size else 0.0

    def cancels_by_qr(self) -> float:
        """``|B| |A| / |B A|``."""
        f = self.factors
        size, norm = _length(f.B) * _length(f.A), LowRankSum.of([(1.0, f)]).norm()
        return size / norm if norm else (math.inf if size else 1.0)


@dataclass(frozen=True)
class _Grams:
    """The inner products of the columns of ``dB`` and ``B0``, and of the rows of ``A`` and ``dA``.

    Each side has those of the first with itself, of both, and of the second with itself. What the
    precision does not suffice for is None.
    """

    left: tuple[Tensor, Tensor, Tensor]
    right: tuple[Tensor, Tensor, Tensor]
    rows: int
    dtype: torch.dtype

    @classmethod
    def of(cls, move: _Move) -> _Grams:
        dB, B0, A, dA = move.dB, move.start.B, move.factors.A.T, move.dA.T
        return cls(
            (_gram(dB, dB), _gram(dB, B0), _gram(B0, B0)),
            (_gram(A, A), _gram(A, dA), _gram(dA, dA)),
            max(len(dB), len(A)),
            dB.dtype,
        )

    def norm(self) -> float | None:
        """The norm of ``dB A + B0 dA``."""
        return self._norm(self.right)

    def parameters(self) -> float | None:
        """The norm of the change of both factors."""
        moved = self.right[2 if len(self.right[2]) else 0]
        square = float(self.left[0].trace()) + float(moved.trace())
        lost = self._smallest * self.rows * (len(self.left[0]) + len(moved))
        return math.sqrt(square) if lost <= ERROR * square < math.inf else None

    def cancels(self, move: _Move) -> float | None:
        """``|B| |A| / |B A|``, with ``B A = dB A + B0 A``."""
        AA, begun = self.right[0], len(self.left[2])
        norm = self._norm((AA, AA[:, :begun], AA[:begun, :begun]))
        if norm is None:
            return None
        size = _length(move.factors.B) * math.sqrt(float(AA.trace()))
        return size / norm if norm else (math.inf if size else 1.0)

    def _norm(self, right: tuple[Tensor, Tensor, Tensor]) -> float | None:
        """The norm of a sum of two products, if it is right to ``ERROR``.

        With n rows and a unit u of rounding, an entry of a Gram matrix is wrong by up to
        ``u n |x| |y|``, and by some ``u sqrt(n) |x| |y|`` where the errors of its n terms are
        independent. For components of the sizes ``t = |l| |r|`` the squared norm is therefore
        wrong by up to ``2 u n (sum t)^2``, and by some ``2 u sqrt(n) sum t^2`` where those of the
        entries are too; relative to the norm itself, each by half of that. What is too small
        for the precision takes up to n times the smallest number from each entry.
        """
        left = self.left
        square = sum(_inner(x, y) * n for x, y, n in zip(left, right, (1, 2, 1), strict=True))
        lefts, rights = (
            torch.cat([x.diagonal(), z.diagonal()]).double() for x, _, z in (left, right)
        )
        sizes = (lefts * rights).sqrt()
        total, squares = float(sizes.sum()) ** 2, float(sizes.square().sum())
        if total == 0 and self.dtype == torch.float64:
            return 0.0
        lost = float(lefts.sqrt().sum()) ** 2 + float(rights.sqrt().sum()) ** 2
        lost = self._smallest * (self.rows * lost + len(sizes) ** 2)
        rows = min(self.rows, SUMMED_ROWS)
        unit = torch.finfo(self.dtype).eps / 2
        errors = (
            (unit * math.sqrt(rows) * squares, ERROR),
            (unit * rows * total, ALIGNED_ERROR),
            (lost, ERROR),
        )
        is_right = all(error <= most * square < math.inf for error, most in errors)
        return math.sqrt(square) if is_right else None

    @property
    def _smallest(self) -> float:
        return torch.finfo(self.dtype).tiny


def _gram(x: Tensor, y: Tensor) -> Tensor:
    """The inner products of the columns of two matrices."""
    if len(x) <= SUMMED_ROWS:
        return x.T @ y
    total = x.new_zeros(x.shape[1], y.shape[1], dtype=torch.float64)
    for first in range(0, len(x), SUMMED_ROWS):
        rows = slice(first, first + SUMMED_ROWS)
        total += x[rows].T @ y[rows]
    return total


def _inner(x: Tensor, y: Tensor) -> float:
    return float((x * y).sum(dtype=torch.float64))


def _size(terms: Sequence[tuple[float, Factors]]) -> float:
    """The summed norms of all components."""
    return sum(float(f.B.norm(dim=0) @ f.A.norm(dim=1)) for _, f in terms)


def _length(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.float64)) if x.numel() else 0.0
