"""The algebra of low-rank sums: add, stack, decompose and measure without the full matrix.

No (out, in) matrix is formed while the factors need less memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flexlora.errors import AdapterError
from flexlora.lowrank.decomposition import decompose
from flexlora.lowrank.factors import Factors
from flexlora.lowrank.svd import SVD, Matrix

BATCH_RANK = 512
"""The summed rank of the terms that are added to a dense sum in one matrix product: wide
enough for the processor's full speed, narrow compared with the matrix itself."""


@dataclass(frozen=True, eq=False)
class LowRankSum:
    """The weighted sum ``sum_i w_i B_i @ A_i`` of factors of one shape, stored as its terms.

    Raises:
        AdapterError: there are no terms, or two terms differ in shape.
    """

    terms: tuple[tuple[float, Factors], ...]

    def __post_init__(self) -> None:
        if not self.terms:
            raise AdapterError("A sum needs at least one term, which gives its shape.")
        shapes = {factors.shape for _, factors in self.terms}
        if len(shapes) > 1:
            raise AdapterError(
                f"Cannot add factors of different shapes (out, in): {sorted(shapes)}; give factors "
                "of the same module."
            )

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

    def stacked(self, dtype: torch.dtype | None = None) -> Factors:
        """One pair of factors of the summed rank with the same product, in ``dtype``.

        ``B`` is (out, sum of ranks) and ``A`` (sum of ranks, in). Only ``A`` is multiplied by
        the weights: in both factors they would be squared.
        """
        dtype = dtype or self.terms[0][1].B.dtype
        B = torch.cat([f.B.to(dtype) for _, f in self.terms], dim=1)
        A = torch.cat([weight * f.A.to(dtype) for weight, f in self.terms], dim=0)
        return Factors(B, A)

    def svd(self, rank: int | None = None, dtype: torch.dtype = torch.float64) -> SVD:
        """The exact singular value decomposition, with the first ``rank`` singular vectors.

        Computed from the factors or from the dense matrix, whichever costs less (see
        ``decompose``).

        Raises:
            AdapterError: a factor contains NaN or infinity.
        """
        return decompose(self.stacked(dtype), rank)

    def norm(self) -> float:
        """The Frobenius norm, by QR in float64.

        Accurate also for terms that cancel; the Gram identity tr((B'B)(AA')) would lose half
        the digits, and all of them in float32.
        """
        stacked = self.stacked(torch.float64)
        return float(torch.linalg.matrix_norm(triangle(stacked.B) @ triangle(stacked.A.T).T))


class Accumulator:
    """A weighted sum that absorbs its terms one by one.

    Terms are stored as they come, in their own dtype, until their summed rank makes one dense
    (out, in) matrix the smaller form; from then on they are added to that matrix, several in
    one product, and dropped. Memory is therefore bounded by ``out * in`` numbers for any
    number of terms. The same terms in the same order give the same bytes; another order gives
    the same sum up to rounding.
    """

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype = torch.float64) -> None:
        self.shape, self.dtype = shape, dtype
        self._waiting: list[tuple[float, Factors]] = []
        self._waiting_rank = 0
        self._dense: Tensor | None = None

    def absorb(self, weight: float, factors: Factors) -> None:
        """Add ``weight * B @ A``.

        Raises:
            AdapterError: the factors differ from the sum in shape.
        """
        if factors.shape != self.shape:
            raise AdapterError(
                f"Cannot add factors of shape {factors.shape} to a sum of shape {self.shape} "
                "(out, in)."
            )
        self._waiting.append((weight, factors))
        self._waiting_rank += factors.rank
        out, in_ = self.shape
        # Dense as soon as that is smaller; after that, once a product is large enough to pay.
        if self._waiting_rank * (out + in_) >= out * in_ or (
            self._dense is not None and self._waiting_rank >= BATCH_RANK
        ):
            self._flush()

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


def triangle(tall: Tensor) -> Tensor:
    """R (columns, columns) of ``tall = Q R``, or ``tall`` itself if it has no more rows."""
    if tall.shape[1] >= tall.shape[0]:
        return tall
    R: Tensor = torch.linalg.qr(tall, mode="r").R
    return R


def norm(factors: Factors) -> float:
    """The Frobenius norm of ``B @ A``, by QR in float64."""
    return LowRankSum.of([(1.0, factors)]).norm()


def normalized(weights: Sequence[float]) -> list[float]:
    """The weights divided by their sum; equal weights if the sum is zero.

    Raises:
        AdapterError: a weight is negative or no number, or their sum is not finite.
    """
    total = sum(weights)
    if not math.isfinite(total) or min(weights) < 0:
        raise AdapterError(
            f"Weights must not be negative and need a finite sum, got {list(weights)[:8]}."
        )
    if total == 0:
        return [1 / len(weights)] * len(weights)
    return [weight / total for weight in weights]
