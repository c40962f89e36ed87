"""Plain averaging: every client at its declared weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flexlora.method.averager import Averager, Mean, Weights
from flexlora.method.averaging import WeightedCohort, client_weights
from flexlora.method.client_changes import Changes
from flexlora.method.interface import RoundContext, Upload


@dataclass(frozen=True)
class Plain(Averager):
    """Weighted means, exact in float64. It has no options."""

    title = "plain averaging"
    offers = frozenset(Mean)

    def cohort(
        self,
        uploads: Sequence[Upload],
        weights: Weights,
        context: RoundContext,
        changes: Changes | None = None,
    ) -> WeightedCohort:
        """Weighted by what the method names."""
        return WeightedCohort(tuple(uploads), client_weights(uploads, weights))
