"""FlexFold, our own: FlexLoRA in which a client adds to its base what its rank cannot train.

A client of rank r receives the first r components of the server's SVD to train, and the
others frozen: it adds them to its base for the round. So it trains on the whole global model,
where in FlexLoRA it trains on a truncation. The server averages the clients' whole models,

``W = sum_k p_k (B_k A_k + frozen_k)``,

the trained components with the frozen ones, which the server has and which do not travel back.
Without gradients this gives back the same W: nothing collapses, where FlexLoRA's components that
a share q of the clients has shrink by q in every round.

``normalise`` "holders" takes each component's mean over the clients that train it instead
(raFLoRA, arXiv 2602.13486), "clients" over all, those that have it frozen included. ``energy``
below 1 truncates what is sent at this share of its squared singular values (FLoRIST's
parameter, arXiv 2506.09199). With equal ranks and energy 1 this is FlexLoRA. Frozen components are
Fed-PLoRA's (arXiv 2602.16936), there with factors averaged one by one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from typing import Literal

import torch

from flexlora.errors import ConfigError
from flexlora.lowrank import Accuracy, Adapter, Factors, Split, normalized
from flexlora.method import (
    Client,
    Cohort,
    Download,
    Feature,
    Info,
    Mean,
    Method,
    RoundContext,
    State,
    Truncation,
    Weighted,
    Weights,
    truncated,
)


@dataclass(frozen=True)
class FlexFold(Method):
    """FlexFold. ``fold`` False leaves the frozen components out of the download."""

    info = Info(
        "FlexFold: FlexLoRA with the other components frozen",
        "this library",
        exact=True,
        up="r*(m+n)",
        down="R*(m+n)",
        server="one SVD of rank S + R",
    )
    needs = frozenset({Mean.PRODUCTS, Mean.PRODUCTS_BY_COMPONENT})

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

    @property
    def features(self) -> frozenset[Feature]:
        """With an energy below 1 the model is not any product: it is cut after its truncation."""
        features = {Feature.MIXED_RANKS, Feature.PER_MODULE, Feature.SAME_FOR_EQUAL_RANKS}
        if self.energy == 1:
            features.add(Feature.PRODUCT_STATE)
        return frozenset(features)

    @property
    def truncation(self) -> Truncation:
        """As the fields say."""
        return Truncation(self.split, self.precision, self.accuracy)

    def handout(self, state: State, client: Client, context: RoundContext) -> Download:
        """The first components to train, and the others frozen."""
        frozen = _beyond(state.model, client.ranks)
        travels = self.fold and any(f.rank for f in frozen.values())
        return replace(truncated(state, client, context), frozen=frozen if travels else None)

    def aggregate(self, state: State, cohort: Cohort, context: RoundContext) -> State:
        """The mean of the clients' whole models as an SVD; costs what FlexLoRA's costs."""
        terms_of = _over_holders if self.normalise == "holders" else _over_clients

        def terms(module: str) -> Iterable[Weighted]:
            return terms_of(cohort, module, state.model[module])

        result = self.truncation.best(terms, state.model, context.ranks)
        model = result.adapter
        if self.energy < 1:
            model = Adapter({m: _cut(f, self.energy) for m, f in model.items()})
        return replace(state, model=model, per_module=result.per_module)


def _beyond(model: Adapter, ranks: Mapping[str, int]) -> Adapter:
    """The components that these ranks do not reach."""
    return Adapter(
        {m: f.components(range(min(ranks[m], f.rank), f.rank)) for m, f in model.items()}
    )


def _over_clients(cohort: Cohort, module: str, last: Factors) -> Iterable[Weighted]:
    """The trained components, and of the last ones the shares of clients that did not train."""
    ranks = cohort.ranks(module)
    share = torch.zeros(last.rank, dtype=torch.float64)
    for weight, rank in zip(normalized(list(cohort.weights.values())), ranks.values(), strict=True):
        share[rank:] += weight
    untrained = Factors(last.B.double() * share, last.A.double())
    return chain(cohort.product_terms(module), [(1.0, untrained)])


def _over_holders(cohort: Cohort, module: str, last: Factors) -> list[Weighted]:
    """The trained components by their clients' shares; the last ones where no client has one."""
    most = max(cohort.ranks(module).values())
    beyond = last.components(range(min(most, last.rank), last.rank))
    return [*cohort.products_by_component(module).terms, (1.0, beyond)]


def _cut(factors: Factors, energy: float) -> Factors:
    """The first components of an SVD that hold this share of its energy; at least one."""
    squares = (factors.B.double().norm(dim=0) * factors.A.double().norm(dim=1)).square()
    reached = squares.cumsum(0) >= energy * squares.sum() * (1 - 1e-12)
    return factors.first(int(reached.int().argmax()) + 1)
