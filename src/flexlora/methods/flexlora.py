"""FlexLoRA (arXiv 2402.11505): average the products, hand out truncated SVDs.

``W = sum_k p_k B_k A_k`` over the cohort, ``p_k`` the client's share of the examples; one
SVD per module; a client of rank r starts from the best rank-r approximation (section 3.2).
The aggregate replaces the last one. With SGD on the clients this is the paper's
FedAvg + FlexLoRA, with AdamW its FedIT + FlexLoRA.

Differs: the product is formed only where it is smaller than its factors, and decomposed by
the cheapest route; the server keeps the terms up to the largest rank that any client can be
handed. A client whose rank exceeds that of the aggregate gets fresh trainable terms, where
the paper's code hands out arbitrary null vectors with zero singular values: the product is
the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import torch

from flexlora.adapter import Adapter, Factors
from flexlora.decomposition import SVD, Split
from flexlora.decompositions import Accuracy, decompose
from flexlora.linalg import Accumulator
from flexlora.method import Method, State, Upload, shares

MOST_WORKERS = 8
"""Modules decomposed at once at most, as each takes the memory of one module's sum."""

Merged = tuple[Factors, float, dict[str, Any]]
"""Of one module: the factors kept, the share of energy lost, how it was decomposed."""


@dataclass(frozen=True)
class FlexLoRA(Method):
    """FlexLoRA. ``split`` says which factor takes the singular values (the paper: left).

    ``accuracy`` "bounded" lets a module be decomposed by block Krylov iteration where that is
    cheaper and its error is shown to be at most a thousandth above the optimum's; else, and
    with "exact" always, the decomposition is exact to rounding.
    """

    title = "FlexLoRA: average of products, redistributed by SVD"
    paper = "arXiv 2402.11505"
    exact = True
    mixed_ranks = True

    split: Split = "left"
    weights: Literal["examples", "uniform"] = "examples"
    precision: Literal["float64", "float32"] = "float64"
    accuracy: Accuracy = "bounded"

    def aggregate(self, state: State, uploads: Sequence[Upload]) -> State:
        """The mean of products as an SVD, module by module, one module on each thread.

        The facts say of each module what energy was lost and how it was decomposed.
        """
        by_examples = self.weights == "examples"
        weights = shares([u.examples if by_examples else 1 for u in uploads])
        known, ranks = state.adapters["global"], state.facts["ranks"]

        def merged(module: str) -> Merged:
            last, rank = known[module], ranks[module]
            total = Accumulator(last.shape, getattr(torch, self.precision))
            for weight, upload in zip(weights, uploads, strict=True):
                total.absorb(weight, upload.adapter[module])
            svd = decompose(total.finalize(), rank, self.accuracy, last)
            factors = svd.factors(rank, self.split).to(last.B.dtype)
            return factors, 1 - svd.energy(rank), _how(svd)

        modules, lost, how = {}, {}, {}
        for module, found in zip(ranks, _in_parallel(merged, list(ranks)), strict=True):
            modules[module], lost[module], how[module] = found
        facts = {"lost_energy": lost, "decomposition": how}
        return State({"global": Adapter(modules)}, {**state.facts, **facts})


def _how(svd: SVD) -> dict[str, Any]:
    """For the record: the route, its excess, and the excess for which another was refused.

    An excess without any bound is None.
    """
    how: dict[str, Any] = {"route": svd.route, "excess": svd.excess}
    if svd.refused is not None:
        how["refused"] = svd.refused if math.isfinite(svd.refused) else None
    return how


def _in_parallel(work: Callable[[str], Merged], modules: Sequence[str]) -> list[Merged]:
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
