"""The algebra of low-rank sums: add up, truncate, measure, without the full-size matrix.

Nothing of the size out x in is made while the factors are the smaller form.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flexlora.errors import AdapterError
from flexlora.lowrank.decomposition import decompose
from flexlora.lowrank.factors import Factors
from flexlora.lowrank.svd import SVD, Matrix

BATCH_RANK = 512
"""The summed rank of the terms that a dense sum takes in one product: wide enough for the
processor's full speed, narrow beside the matrix itself."""


@dataclass(frozen=True, eq=False)
class LowRankSum:
    """The weighted sum ``sum_i w_i B_i A_i`` of factors of one shape, held as its terms.

    Raises:
        AdapterError: there are no terms, or two differ in shape.
    """

    terms: tuple[tuple[float, Factors], ...]

    def __post_init__(self) -> None:
        if not self.terms:
            raise AdapterError("A sum needs at least one term, to know its shape.")
        shapes = {factors.shape for _, factors in self.terms}
        if len(shapes) > 1:
            raise AdapterError(f"Cannot add factors of different shapes (out, in): {shapes}.")

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
        """The exact singular value decomposition, with the vectors of the first ``rank`` values.

        From factors or from the dense matrix, whichever costs less (``decompositions``).

        Raises:
            AdapterError: a factor holds NaN or infinity.
        """
        return decompose(self.stacked(dtype), rank)

    def norm(self) -> float:
        """The Frobenius norm, by QR in float64.

        Terms that cancel are safe here; the Gram identity tr((B'B)(AA')) loses half the
        digits, and all of them in float32.
        """
        stacked = self.stacked(torch.float64)
        return float(torch.linalg.matrix_norm(_triangle(stacked.B) @ _triangle(stacked.A.T).T))

    def inner(self, other: LowRankSum) -> float:
        """The Frobenius inner product with another sum, by one QR of both, in float64."""
        both = (self + other).stacked(torch.float64)
        left, right = _triangle(both.B), _triangle(both.A.T)
        s = self.rank
        mine = left[:, :s] @ right[:, :s].T
        theirs = left[:, s:] @ right[:, s:].T
        return float((mine * theirs).sum())


class Accumulator:
    """A weighted sum that absorbs its terms one by one, and merges with the sum of others.

    Terms are kept as they come, in their own dtype, until their summed rank makes one dense
    (out, in) matrix the smaller form; from then on they are added to that, several in one
    product, and forgotten. So memory is bounded by ``out in`` numbers whatever the number
    of terms. The same terms in the same order give the same bytes; another order or another
    split into merged parts gives the same sum up to rounding.
    """

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype = torch.float64) -> None:
        self.shape, self.dtype = shape, dtype
        self._waiting: list[tuple[float, Factors]] = []
        self._waiting_rank = 0
        self._dense: Tensor | None = None

    def absorb(self, weight: float, factors: Factors) -> None:
        """Add ``weight * B @ A``.

        Raises:
            AdapterError: the shape is another.
        """
        if factors.shape != self.shape:
            raise AdapterError(
                f"Cannot add factors of shape {factors.shape} to a sum of shape {self.shape} "
                "(out, in)."
            )
        self._waiting.append((weight, factors))
        self._waiting_rank += factors.rank
        out, in_ = self.shape
        # Dense once that is smaller; from then on, as soon as a product is worth its start.
        if self._waiting_rank * (out + in_) >= out * in_ or (
            self._dense is not None and self._waiting_rank >= BATCH_RANK
        ):
            self._flush()

    def merge(self, other: Accumulator) -> None:
        """Add the sum that another accumulator holds, which stays as it is.

        Raises:
            AdapterError: the shape or the dtype is another.
        """
        if (other.shape, other.dtype) != (self.shape, self.dtype):
            raise AdapterError(
                f"Cannot merge a sum of shape {other.shape} in {other.dtype} into one of "
                f"shape {self.shape} in {self.dtype}."
            )
        if other._dense is not None:
            self._flush()
            self._dense = other._dense + (0 if self._dense is None else self._dense)
        for weight, factors in other._waiting:
            self.absorb(weight, factors)

    def finalize(self) -> Matrix:
        """The sum, as one pair of factors or as a dense matrix.

        Raises:
            AdapterError: nothing was absorbed.
        """
        if self._dense is None:
            return LowRankSum.of(self._waiting).stacked(self.dtype)
        self._flush()
        return self._dense

    def _flush(self) -> None:
        """Add the waiting terms to the dense sum, in products of about ``BATCH_RANK`` columns."""
        batch: list[tuple[float, Factors]] = []
        waiting, self._waiting, self._waiting_rank = self._waiting[::-1], [], 0
        while waiting:
            batch.append(waiting.pop())
            if not waiting or sum(f.rank for _, f in batch) >= BATCH_RANK:
                stacked = LowRankSum.of(batch).stacked(self.dtype)
                if self._dense is None:
                    self._dense = stacked.B.new_zeros(self.shape)
                self._dense.addmm_(stacked.B, stacked.A)
                batch = []


def _triangle(tall: Tensor) -> Tensor:
    """R of ``tall = Q R``, or ``tall`` where that is no larger."""
    if tall.shape[1] >= tall.shape[0]:
        return tall
    R: Tensor = torch.linalg.qr(tall, mode="r").R
    return R


def norm(factors: Factors) -> float:
    """The Frobenius norm of ``B @ A``, by QR in float64."""
    return LowRankSum.of([(1.0, factors)]).norm()


def normalized(weights: Sequence[float]) -> list[float]:
    """Weights divided by their sum; equal shares if all are zero."""
    total = sum(weights)
    if total == 0:
        return [1 / len(weights)] * len(weights)
    return [weight / total for weight in weights]
