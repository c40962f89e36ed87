"""Naive dense mathematics in float64, against which methods are checked."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from flexlora.lowrank import Factors


def product(factors: Factors) -> Tensor:
    """``B @ A``, dense."""
    return factors.B.double() @ factors.A.double()


def weighted_sum(terms: Iterable[tuple[float, Factors]]) -> Tensor:
    """The weighted sum of products, dense."""
    products = [weight * product(factors) for weight, factors in terms]
    return torch.stack(products).sum(0)


def best(matrix: Tensor, rank: int) -> Tensor:
    """The best approximation of this rank, by the dense SVD."""
    U, S, Vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    approximation: Tensor = (U[:, :rank] * S[:rank]) @ Vt[:rank]
    return approximation


def relative_error(value: Tensor, expected: Tensor) -> float:
    """``||value - expected||_F / ||expected||_F``."""
    scale = torch.linalg.matrix_norm(expected.double()).clamp_min(1e-300)
    return float(torch.linalg.matrix_norm(value.double() - expected.double()) / scale)
