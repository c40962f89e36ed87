"""HetLoRA (arXiv 2401.06432): zero-padded factors, norm weights, ranks that prune themselves.

Server: pad every client's factors with zeros to the largest rank and average B and A with
weights ``w_k`` in proportion to ``||B_k A_k||_F``; a client starts from the first r_k terms.
Client: the loss gains ``decay * sum_layers ||B[:, g:]||_F ||A[g:]||_F`` with
``g = floor(keep * r)``; where the tail product of all layers shrank in training, the client
prunes itself to g. Inexact, as FedIT is.

From reading notes and two re-implementations, not from the paper's text (unverified: one
weight per client over all layers, as here, or one per layer).

Differs: a term that no client of the round holds keeps its last global value. Zeros in both
factors, which padding would leave there, have no gradient and would stay zero for ever.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flexlora.errors import ConfigError
from flexlora.lowrank import Adapter, Factors, normalized, sums
from flexlora.method import Client, Download, Draw, Method, State, Upload, at_ranks


@dataclass(frozen=True)
class HetLoRA(Method):
    """HetLoRA. ``keep`` is the paper's gamma and ``decay`` its lambda."""

    title = "HetLoRA: zero-padding, norm weights, self-pruning"
    paper = "arXiv 2401.06432"
    exact = False
    mixed_ranks = True
    up = "r*(m+n)"
    down = "r*(m+n)"
    server = "norms and sums of factors"

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

    def handout(self, state: State, client: Client, draw: Draw) -> Download:
        """The first terms of the global factors, at the rank that the client has pruned to."""
        pruned = state.facts.get("pruned", {}).get(client.id, {})
        ranks = {m: min(rank, pruned.get(m, rank)) for m, rank in client.ranks.items()}
        return Download(at_ranks(state.adapters["global"], ranks, draw))

    def penalty(self, now: Mapping[str, Factors], start: Download) -> Tensor | None:
        """The decayed tail product of the layers."""
        return self.decay * self._tail(now)

    def shares(self, start: Download, trained: Adapter) -> Adapter:
        """The trained factors, without their tail if it shrank."""
        if not self._tail(trained) < self._tail(start.adapter):
            return trained
        return Adapter({m: f.first(self._head(f.rank)) for m, f in trained.items()})

    def aggregate(self, state: State, uploads: Sequence[Upload]) -> State:
        """Padded factor means with norm weights; reads every upload twice."""
        weights = normalized([_norm(u.adapter) for u in uploads])
        known = state.adapters["global"]
        modules = {
            module: _padded_mean(
                [(w, u.adapter[module]) for w, u in zip(weights, uploads, strict=True)], last
            )
            for module, last in known.items()
        }
        pruned = {
            **state.facts.get("pruned", {}),
            **{u.client: u.adapter.ranks for u in uploads},
        }
        return State({"global": Adapter(modules)}, {**state.facts, "pruned": pruned})

    def _head(self, rank: int) -> int:
        return min(rank, max(math.floor(self.keep * rank), self.smallest_rank))

    def _tail(self, modules: Mapping[str, Factors]) -> Tensor:
        tails = [
            f.B[:, self._head(f.rank) :].norm() * f.A[self._head(f.rank) :].norm()
            for f in modules.values()
        ]
        return torch.stack(tails).sum()


def _norm(adapter: Adapter) -> float:
    """The Frobenius norm of the whole update, all modules together."""
    return math.sqrt(sum(sums.norm(factors) ** 2 for factors in adapter.values()))


def _padded_mean(weighted: list[tuple[float, Factors]], last: Factors) -> Factors:
    """The weighted sum of zero-padded factors, with ``last`` where nobody holds a term."""
    held = max(f.rank for _, f in weighted)
    B, A = last.B.double().clone(), last.A.double().clone()
    B[:, :held], A[:held] = 0, 0
    for weight, f in weighted:
        B[:, : f.rank] += weight * f.B.double()
        A[: f.rank] += weight * f.A.double()
    return Factors(B, A).to(last.B.dtype)
