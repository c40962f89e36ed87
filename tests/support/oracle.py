"""Naive dense mathematics in float64, against which the library is held."""

import torch

from flexlora.lowrank.factors import Factors


def product(factors: Factors) -> torch.Tensor:
    return factors.B.double() @ factors.A.double()


def weighted_sum(terms) -> torch.Tensor:
    return sum(weight * product(factors) for weight, factors in terms)


def best(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    """The best approximation of this rank, by the dense SVD."""
    U, S, Vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vt[:rank]


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    scale = torch.linalg.matrix_norm(want.double()).clamp_min(1e-300)
    return float(torch.linalg.matrix_norm(got.double() - want.double()) / scale)
