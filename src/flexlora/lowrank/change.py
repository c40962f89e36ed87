"""How far the parameters of factors are from others, and points on the way between them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from flexlora.lowrank.distance import product_change
from flexlora.lowrank.factors import Factors
from flexlora.lowrank.sums import triangle


def parameter_change(factors: Factors, start: Factors | None = None) -> float:
    """The norm of all that changed in ``B`` and ``A`` as one vector.

    Terms that one of the two does not have count as zero.
    """
    pairs = [(factors.B, None if start is None else start.B)]
    pairs.append((factors.A.T, None if start is None else start.A.T))
    return math.sqrt(sum(_column_square(x, y) for x, y in pairs))


def between(factors: Factors, start: Factors | None, share: float, only_B: bool = False) -> Factors:
    """The factors with this share of their change from ``start``, or from zero; in float64.

    With ``only_B`` and no start, ``A`` stays as it is, so that the product has the share.
    """
    f = factors.to(torch.float64)
    if start is None:
        return Factors(share * f.B, f.A if only_B else share * f.A)
    rank = max(f.rank, start.rank)
    f, s = f.padded(rank), start.to(torch.float64).padded(rank)
    return Factors(s.B + share * (f.B - s.B), s.A + share * (f.A - s.A))


@dataclass(frozen=True)
class Way:
    """The squared norm of the product's change at a share t of the way: a polynomial in t.

    ``second``, ``third`` and ``fourth`` are its coefficients.
    """

    second: float
    third: float
    fourth: float

    @classmethod
    def of(cls, factors: Factors, start: Factors | None) -> Way:
        """Of the product at ``between(factors, start, t, only_B=True)``; by QR."""
        f = factors.to(torch.float64)
        if start is None:
            return cls(product_change(f).norm ** 2, 0.0, 0.0)
        rank = max(f.rank, start.rank)
        f, s = f.padded(rank), start.to(torch.float64).padded(rank)
        X, Y = f.B - s.B, f.A - s.A
        # t (X A0 + B0 Y) + t^2 X Y, between orthonormal sides that leave norms as they are.
        left, right = triangle(torch.cat([X, s.B], 1)), triangle(torch.cat([s.A, Y]).T)
        P = left @ right.T
        Q = left[:, :rank] @ right[:, rank:].T
        return cls(float((P * P).sum()), float(2 * (P * Q).sum()), float((Q * Q).sum()))

    def norm(self, share: float) -> float:
        """The norm of the change at this share of the way."""
        square = share**2 * (self.second + share * (self.third + share * self.fourth))
        return math.sqrt(max(square, 0.0))


def _column_square(x: Tensor, y: Tensor | None) -> float:
    """The squared norm of ``x - y``, columns that one of them lacks being zero."""
    if y is None:
        return _square(x)
    common = min(x.shape[1], y.shape[1])
    wide = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    change = x[:, :common].to(wide) - y[:, :common].to(wide)
    return _square(change) + _square(x[:, common:]) + _square(y[:, common:])


def _square(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2 if x.numel() else 0.0
