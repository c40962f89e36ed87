"""FedRot-LoRA (arXiv 2602.23638): clients rotate their factors towards the global ones first.

``(B R)(R' A) = B A`` for every orthogonal R, so averaged factors interfere. From the second
round on a client finds the rotation that brings its ``A`` (in odd rounds its ``B``) nearest
to the one it received (Procrustes: ``M = A A_ref'``, ``M = U S V'``, ``R = U V'`` without
reflection), goes a share ``softness`` of the way, and uploads ``B R`` and ``R' A``. The server
averages the factors.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flexlora.errors import ConfigError
from flexlora.lowrank import Adapter, Factors
from flexlora.method import Cohort, Feature, Info, Mean, Method, RoundContext, State, Turn, Weights


@dataclass(frozen=True)
class FedRotLoRA(Method):
    """FedRot-LoRA. ``softness`` 1 is the whole rotation, 0 none (FedIT).

    Unequal ranks are refused at start-up.
    """

    info = Info(
        "FedRot-LoRA: factors rotated into line, then averaged",
        "arXiv 2602.23638",
        up="r*(m+n)",
        down="r*(m+n)",
        server="sums of factors",
        exempt={"gauge": "clients rotate their factors themselves"},
    )
    features = frozenset({Feature.PER_MODULE, Feature.SAME_FOR_EQUAL_RANKS})
    needs = frozenset({Mean.FACTORS})

    softness: float = 0.5
    weights: Weights = "examples"

    def __post_init__(self) -> None:
        if not 0 <= self.softness <= 1:
            raise ConfigError(f"softness is a share in [0, 1], got {self.softness}.")

    def upload_from(self, turn: Turn) -> Adapter:
        """The trained factors, rotated; in the first round as they are."""
        if turn.round == 1:
            return turn.trained
        start, by_A = turn.start.adapter, turn.round % 2 == 0
        return Adapter({m: self._rotated(f, start[m], by_A) for m, f in turn.trained.items()})

    def aggregate(self, state: State, cohort: Cohort, context: RoundContext) -> State:
        """The mean of each factor."""
        model = {m: cohort.factors(m).to(last.B.dtype) for m, last in state.model.items()}
        return replace(state, model=Adapter(model))

    def _rotated(self, f: Factors, reference: Factors, by_A: bool) -> Factors:
        B, A = f.B.double(), f.A.double()
        M = A @ reference.A.double().T if by_A else B.T @ reference.B.double()
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
