"""The data of ``server_step.py``, and its contestants except PEFT."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from flexlora.lowrank.decomposition import decompose
from flexlora.lowrank.factors import Factors
from flexlora.lowrank.sums import LowRankSum
from flexlora.seeds import rng

Weighted = list[tuple[float, Factors]]


@dataclass(frozen=True)
class Case:
    """One module's shape and one federation's ranks, equal shares of each."""

    out: int
    in_: int
    clients: int
    ranks: tuple[int, ...]
    spectrum: Literal["decaying", "flat"] = "decaying"

    @property
    def client_ranks(self) -> list[int]:
        """The rank of every client."""
        times = -(-self.clients // len(self.ranks))
        return (list(self.ranks) * times)[: self.clients]

    @property
    def distinct(self) -> list[int]:
        """The ranks to which the aggregate is truncated."""
        return sorted(set(self.ranks))

    @property
    def title(self) -> str:
        """Its name in the tables."""
        ranks = "/".join(map(str, self.ranks))
        flat = ", flat spectrum" if self.spectrum == "flat" else ""
        return f"{self.out}x{self.in_}, {self.clients} clients of rank {ranks}{flat}"


def federation(case: Case, seed: int) -> Weighted:
    """Weighted factors of all clients, float32.

    Decaying: all clients share the leading directions of one signal, whose spectrum falls as
    i^-0.7, and a client of rank r has the first r of them; its noise has the same spectrum at
    three tenths of the size. An orthogonal rotation (B R, R' A) hides the alignment, as training
    does. Weights are numbers of examples, 16 to 520, as in Natural Instructions.

    Flat: only noise, orthonormal in each factor and equally weighted, so that all directions are
    equally strong: the worst case of every truncation and of every iteration.
    """
    draw = rng(seed, "factors", case.out, case.in_, case.clients)
    top = max(case.ranks)

    def gaussian(rows: int, columns: int, scale: float) -> Tensor:
        return torch.from_numpy(draw.standard_normal((rows, columns)) * scale)

    if case.spectrum == "flat":
        return [
            (
                1 / case.clients,
                Factors(
                    torch.linalg.qr(gaussian(case.out, rank, 1.0)).Q.float(),
                    torch.linalg.qr(gaussian(case.in_, rank, 1.0)).Q.float().T,
                ),
            )
            for rank in case.client_ranks
        ]
    root = torch.arange(1, top + 1, dtype=torch.float64) ** -0.35
    U, V = gaussian(case.out, top, case.out**-0.5), gaussian(case.in_, top, case.in_**-0.5)
    examples = draw.integers(16, 521, case.clients)
    weighted = []
    for share, rank in zip(examples / examples.sum(), case.client_ranks, strict=True):
        B = (U[:, :rank] + gaussian(case.out, rank, 0.3 * case.out**-0.5)) * root[:rank]
        A = (V[:, :rank] + gaussian(case.in_, rank, 0.3 * case.in_**-0.5)) * root[:rank]
        turn = torch.linalg.qr(gaussian(rank, rank, 1.0)).Q
        weighted.append((float(share), Factors((B @ turn).float(), (A @ turn).float().T)))
    return weighted


@dataclass(frozen=True)
class Cuts:
    """A contestant's result: the factors by rank, the route, and the error bound."""

    factors: dict[int, Factors]
    route: str
    excess: float | None = None
    refused: float | None = None


def ours(weighted: Weighted, ranks: Sequence[int], dtype: torch.dtype) -> Cuts:
    """One exact decomposition, then a truncation to each rank."""
    svd = decompose(LowRankSum.of(weighted).stacked(dtype), max(ranks), "exact")
    return Cuts({rank: svd.factors(rank) for rank in ranks}, svd.route)


def bounded(weighted: Weighted, ranks: Sequence[int], dtype: torch.dtype) -> Cuts:
    """One decomposition with a bound, or else an exact one, then a truncation to each rank."""
    svd = decompose(LowRankSum.of(weighted).stacked(dtype), max(ranks), "bounded")
    factors = {rank: svd.factors(rank) for rank in ranks}
    return Cuts(factors, svd.route, svd.excess, svd.refused)


def dense(weighted: Weighted, ranks: Sequence[int], dtype: torch.dtype) -> Cuts:
    """The full matrix and its full SVD, as in the paper's reference implementation."""
    first = weighted[0][1]
    W = torch.zeros(first.shape, dtype=dtype)
    for share, factors in weighted:
        W += share * (factors.B.to(dtype) @ factors.A.to(dtype))
    U, S, Vt = torch.linalg.svd(W, full_matrices=False)
    return Cuts({rank: Factors(U[:, :rank] * S[:rank], Vt[:rank]) for rank in ranks}, "dense")


def peft_bytes(case: Case) -> int:
    """The bytes of PEFT's matrices: each client's dense one, their stack, the weighted stack."""
    return 3 * case.clients * case.out * case.in_ * 4
