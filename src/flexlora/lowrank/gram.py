"""Inner products of low-rank matrices from their factors, and what follows from them.

``<B_i A_i, B_j A_j> = sum((B_i' B_j) o (A_i A_j'))``, so that the geometry of a cohort's updates
needs no (out, in) matrix. Everything is in float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flexlora.errors import AdapterError
from flexlora.lowrank.factors import Factors


def product_gram(factors: Sequence[Factors]) -> Tensor:
    """The inner products (n, n) of the products ``B_i @ A_i`` of n factor pairs of one shape.

    Each pair is reduced by QR first: a sum over the entries of factors whose terms cancel, or
    whose scale lies in one of the two, would lose the digits of the product. Entry (i, j) is then
    right up to rounding relative to ``||W_i|| ||W_j||``, whatever the other norms are.

    Costs O((out + in) R^2) for the summed rank R, and two matrices (out, R) and (R, in).

    Raises:
        AdapterError: the pairs differ in shape, or there is none.
    """
    shapes = {each.shape for each in factors}
    if len(shapes) != 1:
        raise AdapterError(
            f"Inner products need factors of one shape (out, in), got {sorted(shapes)}."
        )
    ((out, in_),) = shapes
    ranks = [min(each.rank, out, in_) for each in factors]
    total = sum(ranks)
    B = torch.empty(out, total, dtype=torch.float64)
    A = torch.empty(in_, total, dtype=torch.float64)
    first = 0
    for each, rank in zip(factors, ranks, strict=True):
        _reduce(each, B[:, first : first + rank], A[:, first : first + rank])
        first += rank
    terms = B.T @ B
    terms *= A.T @ A
    blocks = torch.repeat_interleave(torch.arange(len(ranks)), torch.tensor(ranks))
    rows = torch.zeros(len(ranks), total, dtype=torch.float64).index_add_(0, blocks, terms)
    gram = torch.zeros(len(ranks), len(ranks), dtype=torch.float64)
    return _symmetric(gram.index_add_(1, blocks, rows))


def parameter_gram(factors: Sequence[Factors], ids: Sequence[Sequence[int]]) -> Tensor:
    """The inner products (n, n) of the parameters of n factor pairs, as vectors.

    Component j of pair i stands at place ``ids[i][j]``; a component that a pair lacks counts as
    zero, and so does a factor that does not travel, an empty tensor.
    """
    gram = torch.zeros(len(factors), len(factors), dtype=torch.float64)
    columns: dict[int, list[tuple[int, int]]] = {}
    for pair, numbers in enumerate(ids):
        for place, number in enumerate(numbers):
            columns.setdefault(number, []).append((pair, place))
    for owners in columns.values():
        pairs = torch.tensor([pair for pair, _ in owners])
        for vectors in (
            [factors[pair].B[:, place] for pair, place in owners],
            [factors[pair].A[place] for pair, place in owners],
        ):
            stacked = torch.stack(vectors).double()
            gram[pairs[:, None], pairs] += stacked @ stacked.T
    return _symmetric(gram)


def norms(gram: Tensor) -> Tensor:
    """The Frobenius norm (n,) of each matrix."""
    return gram.diagonal().clamp_min(0).sqrt()


def cosines(gram: Tensor) -> Tensor:
    """The cosine (n, n) of every two matrices; 0 where one of them is zero."""
    sizes = norms(gram)
    scale = torch.where(sizes > 0, 1 / sizes, 0)
    return (gram * scale * scale[:, None]).clamp(-1, 1)


def squared_distances(gram: Tensor) -> Tensor:
    """The squared Frobenius distance (n, n) of every two matrices."""
    squares = gram.diagonal()
    distances = (squares[:, None] + squares - 2 * gram).clamp_min(0)
    return distances.fill_diagonal_(0)


def _reduce(factors: Factors, left: Tensor, right: Tensor) -> None:
    """The same product with orthonormal columns ``right`` (in, rank) and ``left`` (out, rank).

    ``left`` has the norm of the product.
    """
    B, A = factors.B.double(), factors.A.double()
    out, in_ = factors.shape
    if factors.rank > min(out, in_):
        # No smaller form of this rank; the dense matrix is.
        product = B @ A
        B, A = (
            (product, torch.eye(in_, dtype=A.dtype))
            if in_ <= out
            else (torch.eye(out, dtype=B.dtype), product)
        )
    Q, R = torch.linalg.qr(A.T)
    P, S = torch.linalg.qr(B)
    right.copy_(Q)
    torch.mm(P, S @ R.T, out=left)


def _symmetric(gram: Tensor) -> Tensor:
    """Exactly symmetric, so that no rule depends on which of two equal entries it reads."""
    return (gram + gram.T) / 2
