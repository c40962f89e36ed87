"""HetLoRA (arXiv 2401.06432): zero-padded factors, norm weights, ranks that prune themselves.

Server: pad every client's factors with zeros to the largest rank and average B and A with
weights ``w_k`` in proportion to ``||B_k A_k||_F``; a client starts from the first r_k components.
Client: the loss gains ``decay * sum_layers ||B[:, g:]||_F ||A[g:]||_F`` with
``g = floor(keep * r)``; where the tail product of all layers shrank in training, the client
prunes itself to g. Inexact, as FedIT is.

From reading notes and two re-implementations, not from the paper's text (unverified: one
weight per client over all layers, as here, or one per layer).

Differs: a component that no client of the round has keeps its last global value. Zeros in both
factors, which padding would leave there, have no gradient and would stay zero for ever.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flexlora.errors import ConfigError
from flexlora.lowrank import Adapter, Factors
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
    Turn,
    Weights,
    at_ranks,
)


@dataclass(frozen=True)
class HetLoRA(Method):
    """HetLoRA. ``keep`` is the paper's gamma and ``decay`` its lambda."""

    info = Info(
        "HetLoRA: zero-padding, norm weights, self-pruning",
        "arXiv 2401.06432",
        up="r*(m+n)",
        down="r*(m+n)",
        server="norms and sums of factors",
    )
    features = frozenset({Feature.MIXED_RANKS})
    needs = frozenset({Mean.PADDED_FACTORS})

    keep: float = 0.99
    decay: float = 0.01
    smallest_rank: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise ConfigError(f"keep is a share of the rank in (0, 1], got {self.keep}.")
        if not 0 <= self.decay < math.inf:
            raise ConfigError(f"decay is finite and not negative, got {self.decay}.")
        if self.smallest_rank < 1:
            raise ConfigError(f"smallest_rank is at least 1, got {self.smallest_rank}.")

    @property
    def weights(self) -> Weights:
        """Clients count by the norm of their update."""
        return "norms"

    def handout(self, state: State, client: Client, context: RoundContext) -> Download:
        """The first components of the model, at the rank that the client has pruned to."""
        pruned = state.per_client.get("ranks", {}).get(client.id, {})
        ranks = {m: min(rank, pruned.get(m, rank)) for m, rank in client.ranks.items()}
        return Download(at_ranks(state.model, ranks, context))

    def penalty(self, current: Mapping[str, Factors], start: Download) -> Tensor | None:
        """The decayed tail product of the layers."""
        return self.decay * self._tail(current)

    def upload_from(self, turn: Turn) -> Adapter:
        """The trained factors, without their tail if it shrank."""
        if not self._tail(turn.trained) < self._tail(turn.start.adapter):
            return turn.trained
        return Adapter({m: f.first(self._head(f.rank)) for m, f in turn.trained.items()})

    def aggregate(self, state: State, cohort: Cohort, context: RoundContext) -> State:
        """Means of zero-padded factors with norm weights; reads every upload twice."""
        model = {
            m: cohort.padded_factors(m, last).to(last.B.dtype) for m, last in state.model.items()
        }
        ranks: dict[str, dict[str, int]] = {client: {} for client in cohort.clients}
        for module in state.model:
            for client, rank in cohort.ranks(module).items():
                ranks[client][module] = rank
        pruned = {**state.per_client.get("ranks", {}), **ranks}
        return replace(
            state, model=Adapter(model), per_client={**state.per_client, "ranks": pruned}
        )

    def _head(self, rank: int) -> int:
        return min(rank, max(math.floor(self.keep * rank), self.smallest_rank))

    def _tail(self, modules: Mapping[str, Factors]) -> Tensor:
        tails = [
            f.B[:, self._head(f.rank) :].norm() * f.A[self._head(f.rank) :].norm()
            for f in modules.values()
        ]
        return torch.stack(tails).sum()
