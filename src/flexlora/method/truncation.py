"""Sums of products as truncated SVDs, one module on each thread."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch

from flexlora.lowrank import SVD, Accumulator, Accuracy, Adapter, Factors, Split, decompose

Weighted = tuple[float, Factors]
"""One term of a sum of products: a weight and the factors."""
Result = TypeVar("Result")

MAX_THREADS = 8
"""How many modules are decomposed at once at most: each takes the memory of one module's sum."""


@dataclass(frozen=True)
class Truncated:
    """Truncated sums by module, and per module the energy lost and how it was decomposed."""

    adapter: Adapter
    lost_energy: Mapping[str, float]
    decomposition: Mapping[str, Mapping[str, Any]]

    @property
    def per_module(self) -> dict[str, Mapping[str, Any]]:
        """Both as ``State.per_module`` holds them."""
        return {"lost_energy": self.lost_energy, "decomposition": self.decomposition}


@dataclass(frozen=True)
class Truncation:
    """How sums are decomposed. ``split`` says which factor takes the singular values.

    ``accuracy`` "bounded" lets a module be decomposed by block Krylov iteration where that is
    cheaper and its error is shown to be at most a thousandth above the optimum's; else, and
    with "exact" always, the decomposition is exact to rounding.
    """

    split: Split = "left"
    precision: Literal["float64", "float32"] = "float64"
    accuracy: Accuracy = "exact"

    def svd(self, terms: Iterable[Weighted], start: Factors, rank: int) -> SVD:
        """The SVD of a sum with vectors up to ``rank``.

        ``start`` has the sum's shape, and is a guess at the result: no accuracy rests on it.
        """
        total = Accumulator(start.shape, getattr(torch, self.precision))
        for weight, factors in terms:
            total.absorb(weight, factors)
        return decompose(total.finalize(), rank, self.accuracy, start)

    def best(
        self,
        terms: Callable[[str], Iterable[Weighted]],
        start: Mapping[str, Factors],
        ranks: Mapping[str, int],
    ) -> Truncated:
        """The best approximations of the sums of ``terms(module)``, at these ranks.

        ``start`` gives each module's shape and dtype; see ``svd``.
        """

        def truncated(module: str) -> tuple[Factors, float, dict[str, Any]]:
            last, rank = start[module], ranks[module]
            if rank == 0:
                return Factors(last.B[:, :0], last.A[:0]), 0.0, {}
            svd = self.svd(terms(module), last, rank)
            factors = svd.factors(rank, self.split).to(last.B.dtype)
            return factors, 1 - svd.energy(rank), described(svd)

        results = dict(zip(ranks, in_parallel(truncated, list(ranks)), strict=True))
        return Truncated(
            Adapter({module: factors for module, (factors, _, _) in results.items()}),
            {module: lost for module, (_, lost, _) in results.items()},
            {module: route for module, (_, _, route) in results.items()},
        )


def described(svd: SVD) -> dict[str, Any]:
    """For the journal: the route, its excess, and the excess for which another was refused.

    An excess without any bound is None.
    """
    route: dict[str, Any] = {"route": svd.route, "excess": svd.excess}
    if svd.refused is not None:
        route["refused"] = svd.refused if math.isfinite(svd.refused) else None
    return route


def in_parallel(work: Callable[[str], Result], modules: Sequence[str]) -> list[Result]:
    """``work`` of every module, in their order; as many at once as there are threads.

    A module on a thread of its own is faster than all threads on one module, as much of a
    decomposition is serial.
    """
    threads = torch.get_num_threads()
    workers = max(1, min(threads, len(modules), MAX_THREADS))
    # A new thread takes over the number that is set when it first computes.
    torch.set_num_threads(threads // workers)
    try:
        with ThreadPoolExecutor(workers) as pool:
            return list(pool.map(work, modules))
    finally:
        torch.set_num_threads(threads)


def total(
    updates: Iterable[Adapter], start: Mapping[str, Factors], ranks: Iterable[str] | None = None
) -> Adapter:
    """The sum of several adapters' products, in the order of an SVD, at its full rank.

    ``start`` gives each module's shape and dtype. Costs a full SVD of each module.
    """
    parts = list(updates)

    def terms(module: str) -> list[Weighted]:
        present = [(1.0, part[module]) for part in parts if module in part]
        last = start[module]
        return present or [(1.0, Factors(last.B[:, :0], last.A[:0]))]

    full = {m: min(sum(f.rank for _, f in terms(m)), *start[m].shape) for m in ranks or start}
    return Truncation().best(terms, start, full).adapter
