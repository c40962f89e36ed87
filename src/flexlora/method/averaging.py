"""What several methods do with a cohort's uploads: sums to SVDs, means, and merged updates."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from flexlora.lowrank import (
    SVD,
    Accumulator,
    Accuracy,
    Adapter,
    Factors,
    Split,
    decompose,
    normalized,
)
from flexlora.method.interface import Client, State, Upload

Weighted = tuple[float, Factors]
Weights = Literal["examples", "uniform"]
Found = TypeVar("Found")

MOST_WORKERS = 8
"""Modules decomposed at once at most, as each takes the memory of one module's sum."""


@dataclass(frozen=True)
class Decomposing:
    """How sums are decomposed. ``split`` says which factor takes the singular values.

    ``accuracy`` "bounded" lets a module be decomposed by block Krylov iteration where that is
    cheaper and its error is shown to be at most a thousandth above the optimum's; else, and
    with "exact" always, the decomposition is exact to rounding.
    """

    split: Split = "left"
    precision: Literal["float64", "float32"] = "float64"
    accuracy: Accuracy = "exact"

    def svd(self, terms: Iterable[Weighted], last: Factors, rank: int) -> SVD:
        """The SVD of a sum with vectors up to ``rank``; of ``last`` only the shape must fit."""
        total = Accumulator(last.shape, getattr(torch, self.precision))
        for weight, factors in terms:
            total.absorb(weight, factors)
        return decompose(total.finalize(), rank, self.accuracy, last)

    def best(
        self, terms: Callable[[str], Iterable[Weighted]], known: Adapter, ranks: Mapping[str, int]
    ) -> tuple[Adapter, dict[str, Any]]:
        """The best approximations of the sums of ``terms(module)``, one module on each thread.

        With them the facts ``lost_energy`` and ``decomposition`` of each module.
        """

        def found(module: str) -> tuple[Factors, float, dict[str, Any]]:
            last, rank = known[module], ranks[module]
            if rank == 0:
                return Factors(last.B[:, :0], last.A[:0]), 0.0, {}
            svd = self.svd(terms(module), last, rank)
            return svd.factors(rank, self.split).to(last.B.dtype), 1 - svd.energy(rank), how(svd)

        modules, lost, ways = {}, {}, {}
        for module, each in zip(ranks, in_parallel(found, list(ranks)), strict=True):
            modules[module], lost[module], ways[module] = each
        return Adapter(modules), {"lost_energy": lost, "decomposition": ways}


def how(svd: SVD) -> dict[str, Any]:
    """For the record: the route, its excess, and the excess for which another was refused.

    An excess without any bound is None.
    """
    said: dict[str, Any] = {"route": svd.route, "excess": svd.excess}
    if svd.refused is not None:
        said["refused"] = svd.refused if math.isfinite(svd.refused) else None
    return said


def in_parallel(work: Callable[[str], Found], modules: Sequence[str]) -> list[Found]:
    """``work`` of every module, in their order; as many at once as there are threads.

    A module on a thread of its own is faster than all threads on one module, as much of a
    decomposition is serial.
    """
    threads = torch.get_num_threads()
    workers = max(1, min(threads, len(modules), MOST_WORKERS))
    # A new thread takes over the number that stands when it first computes.
    torch.set_num_threads(threads // workers)
    try:
        with ThreadPoolExecutor(workers) as pool:
            return list(pool.map(work, modules))
    finally:
        torch.set_num_threads(threads)


def weights_of(uploads: Sequence[Upload], weights: Weights = "examples") -> list[float]:
    """Each upload's share of the cohort, in their order; they add up to 1."""
    return normalized([u.examples if weights == "examples" else 1 for u in uploads])


def weighted(
    uploads: Sequence[Upload], weights: Weights = "examples"
) -> Callable[[str], list[Weighted]]:
    """Of a module, each upload's share of the cohort with its factors, in their order."""
    found = weights_of(uploads, weights)
    return lambda module: [(w, u.adapter[module]) for w, u in zip(found, uploads, strict=True)]


def factor_means(weighted: Sequence[Weighted]) -> Factors:
    """The weighted sum of ``B`` and of ``A``, each for itself, in float64; of one rank all.

    Its product is *not* the weighted sum of the products; the difference is the covariance
    of the factors.
    """
    first = weighted[0][1].to(torch.float64)
    B, A = torch.zeros_like(first.B), torch.zeros_like(first.A)
    for weight, f in weighted:
        B += weight * f.B.double()
        A += weight * f.A.double()
    return Factors(B, A)


def rank_wise(weighted: Sequence[Weighted]) -> list[Tensor]:
    """Each client's weight in each of its terms: its share among those who hold the term.

    ``w_kj = w_k / sum_{i: r_i > j} w_i`` for j < r_k (methods of raFLoRA, arXiv 2602.13486,
    and RB-LoRA alike).
    """
    held = torch.zeros(max(f.rank for _, f in weighted), dtype=torch.float64)
    for weight, f in weighted:
        held[: f.rank] += weight
    return [weight / held[: f.rank].clamp_min(1e-300) for weight, f in weighted]


def rank_wise_means(weighted: Sequence[Weighted], last: Factors) -> Factors:
    """The mean of each column of ``B`` and row of ``A`` over its holders, in float64.

    A term that nobody holds is that of ``last``, at which all are padded to.
    """
    held = max(f.rank for _, f in weighted)
    B, A = last.B.double().clone(), last.A.double().clone()
    B[:, :held], A[:held] = 0, 0
    for share, (_, f) in zip(rank_wise(weighted), weighted, strict=True):
        B[:, : f.rank] += f.B.double() * share
        A[: f.rank] += f.A.double() * share[:, None]
    return Factors(B, A)


MERGED = "merged-"


def log(state: State) -> dict[int, Adapter]:
    """The updates that clients merge into their base for good, by the round that made them."""
    return {
        int(name.removeprefix(MERGED)): adapter
        for name, adapter in sorted(state.adapters.items())
        if name.startswith(MERGED)
    }


def unmerged(state: State, client: Client) -> dict[int, Adapter]:
    """What of the log ``client`` has not merged yet, as far as its uploads have shown."""
    last = state.facts.get("merged", {}).get(client.id, 0)
    return {round: adapter for round, adapter in log(state).items() if round > last}


def held(state: State, client: Client) -> list[int]:
    """The rounds whose entries of the log ``client`` has merged."""
    last = state.facts.get("merged", {}).get(client.id, 0)
    return [round for round in log(state) if round <= last]


def forgotten(state: State, client: str) -> State:
    """The state, in which ``client`` has merged nothing: it has lost what it had."""
    merged = {id: last for id, last in state.facts.get("merged", {}).items() if id != client}
    return State(state.adapters, {**state.facts, "merged": merged})


def logged(
    state: State, entry: Adapter, uploads: Sequence[Upload], adapters: Mapping[str, Adapter]
) -> State:
    """The state with ``adapters``, the log so far and this round's entry.

    Whoever sent an upload had merged all entries before this one.
    """
    round = uploads[0].round
    entries = {f"{MERGED}{number:05d}": adapter for number, adapter in log(state).items()}
    entries[f"{MERGED}{round:05d}"] = entry
    merged = {**state.facts.get("merged", {}), **{u.client: round - 1 for u in uploads}}
    return State({**adapters, **entries}, {**state.facts, "merged": merged})


def summed(state: State, shapes: Mapping[str, Factors], beside: Sequence[Adapter] = ()) -> Adapter:
    """All of the log and the adapters ``beside``, as one adapter in the order of an SVD.

    ``shapes`` says each module's shape and dtype. Costs a full SVD of each module.
    """
    parts = [*log(state).values(), *beside]

    def terms(module: str) -> list[Weighted]:
        found = [(1.0, part[module]) for part in parts if module in part]
        last = shapes[module]
        return found or [(1.0, Factors(last.B[:, :0], last.A[:0]))]

    def rank(module: str) -> int:
        return min(sum(f.rank for _, f in terms(module)), *shapes[module].shape)

    known = Adapter(dict(shapes))
    return Decomposing().best(terms, known, {m: rank(m) for m in shapes})[0]
