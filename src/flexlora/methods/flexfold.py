"""FlexFold, our own: FlexLoRA in which a client folds in what its rank cannot train.

A client of rank r is handed the first r terms of the server's SVD to train, and the others
as a rest that it adds to its base for the round. So it trains on the whole global model,
where in FlexLoRA it trains on a truncation. The server averages the clients' whole models,

``W = sum_k p_k (B_k A_k + rest_k)``,

the trained terms with the rest that the server handed out itself and that does not travel
back. Without gradients this gives back the same W: nothing collapses, where FlexLoRA's terms
that a share q of the clients holds shrink by q in every round.

``normalise`` "holders" takes each term's mean over the clients that train it instead
(raFLoRA, arXiv 2602.13486), "clients" over all, those who hold it still included. ``energy``
below 1 cuts what is handed out at this share of its squared singular values (FLoRIST's
knob, arXiv 2506.09199). With equal ranks and energy 1 this is FlexLoRA. Folding the rest is
Fed-PLoRA's (arXiv 2602.16936), there with factors averaged one by one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from flexlora.errors import ConfigError
from flexlora.lowrank import Accuracy, Adapter, Factors, Split
from flexlora.method import (
    Client,
    Decomposing,
    Download,
    Draw,
    Method,
    State,
    Upload,
    Weighted,
    Weights,
    at_ranks,
    rank_wise,
    weighted,
)


@dataclass(frozen=True)
class FlexFold(Method):
    """FlexLoRA with the rest folded in. ``fold`` False leaves the rest out of the download."""

    title = "FlexFold: FlexLoRA with the rest folded in"
    paper = "this library"
    exact = True
    mixed_ranks = True
    by_module = True
    product = True
    up = "r*(m+n)"
    down = "R*(m+n)"
    server = "one SVD of rank S + R"

    fold: bool = True
    normalise: Literal["clients", "holders"] = "clients"
    energy: float = 1.0
    split: Split = "left"
    weights: Weights = "examples"
    precision: Literal["float64", "float32"] = "float64"
    accuracy: Accuracy = "bounded"

    def __post_init__(self) -> None:
        if not 0 < self.energy <= 1:
            raise ConfigError(f"energy is a share in (0, 1], got {self.energy}.")

    def handout(self, state: State, client: Client, draw: Draw) -> Download:
        """The first terms to train, and the others to fold in."""
        known = state.adapters["global"]
        rest = _beyond(known, client.ranks)
        travels = self.fold and any(f.rank for f in rest.values())
        return Download(at_ranks(known, client.ranks, draw), rest if travels else None)

    def aggregate(self, state: State, uploads: Sequence[Upload]) -> State:
        """The mean of the clients' whole models as an SVD; costs what FlexLoRA's costs."""
        held, known = weighted(uploads, self.weights), state.adapters["global"]

        def terms(module: str) -> list[Weighted]:
            if self.normalise == "holders":
                return _over_holders(held(module), known[module])
            return _over_clients(held(module), known[module])

        how = Decomposing(self.split, self.precision, self.accuracy)
        adapter, facts = how.best(terms, known, state.facts["ranks"])
        if self.energy < 1:
            adapter = Adapter({m: _cut(f, self.energy) for m, f in adapter.items()})
        return State({"global": adapter}, {**state.facts, **facts})


def _beyond(known: Adapter, ranks: Mapping[str, int]) -> Adapter:
    """The terms that these ranks do not reach."""
    return Adapter({m: f.terms(range(min(ranks[m], f.rank), f.rank)) for m, f in known.items()})


def _over_clients(held: Sequence[Weighted], last: Factors) -> list[Weighted]:
    """The trained terms, and of the last ones the shares of the clients that did not train."""
    share = torch.zeros(last.rank, dtype=torch.float64)
    for weight, f in held:
        share[f.rank :] += weight
    return [*held, (1.0, Factors(last.B.double() * share, last.A.double()))]


def _over_holders(held: Sequence[Weighted], last: Factors) -> list[Weighted]:
    """The trained terms by their holders' shares; the last ones where there is no holder."""
    most = max(f.rank for _, f in held)
    found = [
        (1.0, Factors(f.B.double() * share, f.A.double()))
        for share, (_, f) in zip(rank_wise(held), held, strict=True)
    ]
    return [*found, (1.0, last.terms(range(min(most, last.rank), last.rank)))]


def _cut(factors: Factors, energy: float) -> Factors:
    """The first terms of an SVD that hold this share of its energy; at least one."""
    squares = (factors.B.double().norm(dim=0) * factors.A.double().norm(dim=1)).square()
    reached = squares.cumsum(0) >= energy * squares.sum() * (1 - 1e-12)
    return factors.first(int(reached.int().argmax()) + 1)
