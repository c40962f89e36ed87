"""FedAdam (arXiv 2003.00295, algorithm 2): the server's step is measured by its own size.

``M = b1 M + (1 - b1) D``, ``v = b2 v + (1 - b2) mean(D^2)``,
``W = W + rate M / (sqrt(v) + tau)``, with v = tau^2 before the first step.

Differs: one second moment for each module, the mean square of its change, where the paper has
one for each entry: a product divided entry by entry has no low rank. A step's entries are
``rate`` in size on average, as the paper's are one by one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from flexlora.errors import ConfigError
from flexlora.lowrank import LowRankSum
from flexlora.method.server_optimizer import ServerOptimizer, Step


@dataclass(frozen=True)
class FedAdam(ServerOptimizer):
    """FedAdam. ``rate`` is the size of a step's entries, ``tau`` a change not worth a step."""

    title = "FedAdam: server momentum at a measured step size"
    paper = "arXiv 2003.00295"

    rate: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.99)
    tau: float = 1e-6

    def __post_init__(self) -> None:
        for name in ("rate", "tau"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} is finite and above 0, got {getattr(self, name)}.")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"betas lie in [0, 1), got {self.betas}.")

    def step(self, change: LowRankSum, moment: float | None) -> Step:
        """One norm of the change, by QR of its factors."""
        (b1, b2), (out, in_) = self.betas, change.shape
        last = self.tau**2 if moment is None else moment
        square = b2 * last + (1 - b2) * change.norm() ** 2 / (out * in_)
        return Step(b1, 1 - b1, self.rate / (math.sqrt(square) + self.tau), square)
