"""RoLoRA (arXiv 2409.02346): rounds that train ``B`` alone, then rounds that train ``A`` alone.

The half that is not trained is common to all clients, so the mean of the other is the mean
of the products. The first round trains ``B``: with ``B = 0`` the gradient of ``A`` is zero.

Differs: both halves travel down, so that a client that missed a round needs nothing special;
only the trained one travels up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flexlora.lowrank import Adapter, Factors, Halves
from flexlora.method import (
    Client,
    Download,
    Draw,
    Expected,
    Method,
    State,
    Upload,
    Weights,
    at_ranks,
    factor_means,
    half_expected,
    weighted,
)


@dataclass(frozen=True)
class RoLoRA(Method):
    """RoLoRA. Unequal ranks are refused at start-up."""

    title = "RoLoRA: B and A in turn"
    paper = "arXiv 2409.02346"
    exact = True
    mixed_ranks = False
    by_module = True
    up = "r*m or r*n"
    down = "r*(m+n)"
    server = "sums of factors"

    weights: Weights = "examples"

    def handout(self, state: State, client: Client, draw: Draw) -> Download:
        """The global adapter, with the half that it is the turn of."""
        known = at_ranks(state.adapters["global"], client.ranks, draw)
        return Download(known, halves=_turn(state))

    def shares(self, start: Download, trained: Adapter) -> Adapter:
        """The half that was trained."""
        return trained.half(start.halves)

    def expects(
        self, state: State, client: Client, shapes: Mapping[str, tuple[int, int]]
    ) -> Mapping[str, Expected]:
        """The half that it is the turn of."""
        return half_expected(client, shapes, _turn(state))

    def aggregate(self, state: State, uploads: Sequence[Upload]) -> State:
        """The mean of the half that was trained."""
        held, turn = weighted(uploads, self.weights), _turn(state)
        modules = {}
        for module, last in state.adapters["global"].items():
            mean = factor_means(held(module)).to(last.B.dtype)
            modules[module] = Factors(mean.B, last.A) if turn == "B" else Factors(last.B, mean.A)
        rounds = state.facts.get("rounds", 0) + 1
        return State({"global": Adapter(modules)}, {**state.facts, "rounds": rounds})


def _turn(state: State) -> Halves:
    return "A" if state.facts.get("rounds", 0) % 2 else "B"
