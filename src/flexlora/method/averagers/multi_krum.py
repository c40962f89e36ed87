"""Multi-Krum (Blanchard et al., NeurIPS 2017): the mean of the clients that are nearest to others.

A client's score is the sum of the squared distances to its n - f - 2 nearest others, for f
expected attackers; clients with the highest scores are left out.

Differs: distances are between changes relative to what was handed out, all modules together,
products where the method averages products; 2 f clients are left out, and the others keep the
weights that the method gives them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flexlora.errors import ConfigError, ProtocolError
from flexlora.lowrank import squared_distances
from flexlora.method.averager import Averager, Mean, Weights
from flexlora.method.averaging import WeightedCohort, reweighted
from flexlora.method.client_changes import Changes
from flexlora.method.interface import RoundContext, Upload


@dataclass(frozen=True)
class MultiKrum(Averager):
    """Multi-Krum. ``attackers`` is the share of a round's clients that may be malicious.

    Twice as many are left out, in rounds without any attacker too. Of n uploads at most
    (n - 3) / 2 attackers can be expected.
    """

    title = "multi-Krum"
    offers = frozenset(Mean) - {Mean.UPLOADS, Mean.AUX_FACTORS}
    accepts = frozenset({"examples", "uniform"})
    least = 5

    attackers: float = 0.2

    def __post_init__(self) -> None:
        if not 0 < self.attackers < 0.5:
            raise ConfigError(f"attackers is a share in (0, 0.5), got {self.attackers}.")

    def cohort(
        self,
        uploads: Sequence[Upload],
        weights: Weights,
        context: RoundContext,
        changes: Changes | None = None,
    ) -> WeightedCohort:
        """The clients with the lowest scores, weighted as the method weights them."""
        if changes is None:
            raise ProtocolError(f"The averager {self.title!r} needs the clients' changes.")
        expected = self.expected(len(uploads))
        scores = krum_scores(changes.gram(list(context.ranks)), expected)
        kept = set(scores.argsort(stable=True)[: len(uploads) - 2 * expected].tolist())
        declared = changes.declared.tolist()
        shares = [weight * (number in kept) for number, weight in enumerate(declared)]
        return reweighted(uploads, shares, scores.tolist())

    def expected(self, uploads: int) -> int:
        """How many attackers are expected among so many uploads."""
        wanted = math.ceil(self.attackers * uploads - 1e-9)
        return max(min(wanted, (uploads - 3) // 2), 0)


def krum_scores(gram: Tensor, expected: int) -> Tensor:
    """The sum (n,) of the squared distances of each vector to its n - f - 2 nearest others.

    ``gram`` (n, n) has the inner products of the vectors; at least one other counts.
    """
    squares = squared_distances(gram)
    nearest = max(len(squares) - expected - 2, 1)
    # The first is the vector itself.
    values = squares.fill_diagonal_(-1).sort(dim=1).values[:, 1 : nearest + 1]
    return values.sum(1) if values.numel() else torch.zeros(len(gram), dtype=torch.float64)
