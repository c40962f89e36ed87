"""FedAvgM (arXiv 1909.06335): the server's step has momentum.

``M = momentum M + D`` and ``W = W + rate M``. With no momentum and a rate of 1 the next model
is the aggregate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from flexlora.errors import ConfigError
from flexlora.lowrank import LowRankSum
from flexlora.method.server_optimizer import ServerOptimizer, Step


@dataclass(frozen=True)
class FedAvgM(ServerOptimizer):
    """FedAvgM. ``momentum`` is the paper's beta, ``rate`` the server's learning rate."""

    title = "FedAvgM: server momentum"
    paper = "arXiv 1909.06335"

    momentum: float = 0.9
    rate: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise ConfigError(f"momentum lies in [0, 1), got {self.momentum}.")
        if not 0 < self.rate < math.inf:
            raise ConfigError(f"rate is finite and above 0, got {self.rate}.")

    def step(self, change: LowRankSum, moment: float | None) -> Step:
        """The same for every module; costs nothing."""
        return Step(self.momentum, 1.0, self.rate)
