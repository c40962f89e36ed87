"""FedRot-LoRA (arXiv 2602.23638): clients turn their factors towards the global ones first.

``(B R)(R' A) = B A`` for every orthogonal R, so means of factors interfere. From the second
round on a client finds the rotation that brings its ``A`` (in odd rounds its ``B``) nearest
to the one it was handed (Procrustes: ``M = A A_ref'``, ``M = U S V'``, ``R = U V'`` without
reflection), goes a share ``softness`` of the way, and uploads ``B R`` and ``R' A``. The server
averages the factors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flexlora.errors import ConfigError
from flexlora.lowrank import Adapter, Factors
from flexlora.method import (
    Client,
    Download,
    Draw,
    Method,
    State,
    Upload,
    Weights,
    factor_means,
    weighted,
)


@dataclass(frozen=True)
class FedRotLoRA(Method):
    """FedRot-LoRA. ``softness`` 1 is the whole rotation, 0 none (FedIT).

    Unequal ranks are refused at start-up.
    """

    title = "FedRot-LoRA: factors rotated into line, then averaged"
    paper = "arXiv 2602.23638"
    exact = False
    mixed_ranks = False
    by_module = True
    up = "r*(m+n)"
    down = "r*(m+n)"
    server = "sums of factors"

    softness: float = 0.5
    weights: Weights = "examples"

    def __post_init__(self) -> None:
        if not 0 <= self.softness <= 1:
            raise ConfigError(f"softness is a share in [0, 1], got {self.softness}.")

    def handout(self, state: State, client: Client, draw: Draw) -> Download:
        """The global factors, and how many rounds they have seen."""
        rounds = state.facts.get("rounds", 0)
        return replace(super().handout(state, client, draw), facts={"rounds": rounds})

    def shares(self, start: Download, trained: Adapter) -> Adapter:
        """The trained factors, turned; in the first round as they are."""
        rounds = start.facts.get("rounds", 0)
        if rounds == 0:
            return trained
        return Adapter(
            {m: self._turned(f, start.adapter[m], rounds % 2 == 1) for m, f in trained.items()}
        )

    def aggregate(self, state: State, uploads: Sequence[Upload]) -> State:
        """The mean of each factor."""
        held = weighted(uploads, self.weights)
        modules = {
            module: factor_means(held(module)).to(last.B.dtype)
            for module, last in state.adapters["global"].items()
        }
        rounds = state.facts.get("rounds", 0) + 1
        return State({"global": Adapter(modules)}, {**state.facts, "rounds": rounds})

    def _turned(self, f: Factors, towards: Factors, by_A: bool) -> Factors:
        B, A = f.B.double(), f.A.double()
        M = A @ towards.A.double().T if by_A else B.T @ towards.B.double()
        R = _rotation(M)
        R = _rotation((1 - self.softness) * torch.eye(len(R), dtype=R.dtype) + self.softness * R)
        return Factors(B @ R, R.T @ A).to(f.B.dtype)


def _rotation(M: Tensor) -> Tensor:
    """The rotation nearest to ``M``, of determinant 1."""
    U, _, Vt = torch.linalg.svd(M)
    if torch.linalg.det(U @ Vt) < 0:
        Vt = torch.cat([Vt[:-1], -Vt[-1:]])
    R: Tensor = U @ Vt
    return R
