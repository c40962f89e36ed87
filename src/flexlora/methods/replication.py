"""Replication padding (arXiv 2406.17477): what a client lacks is filled from those who have it.

Zero padding dilutes the terms that few clients hold. Filled with the mean of their holders
instead, the mean of all clients is the mean of the holders: each column of ``B`` and row of
``A`` is averaged over the clients that hold it. PreLort and FediLoRA aggregate alike.

From the abstract (unverified: the paper fills from the clients with the better data). A term
that no client of the round holds keeps its last value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flexlora.lowrank import Adapter
from flexlora.method import Method, State, Upload, Weights, rank_wise_means, weighted


@dataclass(frozen=True)
class Replication(Method):
    """Replication padding: rank-wise means of the factors, handed out by truncation."""

    title = "Replication padding: factors averaged rank by rank"
    paper = "arXiv 2406.17477"
    exact = False
    mixed_ranks = True
    by_module = True
    up = "r*(m+n)"
    down = "r*(m+n)"
    server = "sums of factors"

    weights: Weights = "examples"

    def aggregate(self, state: State, uploads: Sequence[Upload]) -> State:
        """The mean of each term's two vectors over its holders."""
        held = weighted(uploads, self.weights)
        modules = {}
        for module, last in state.adapters["global"].items():
            modules[module] = rank_wise_means(held(module), last).to(last.B.dtype)
        return State({"global": Adapter(modules)}, state.facts)
