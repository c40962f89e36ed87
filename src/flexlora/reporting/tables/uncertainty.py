"""95 % intervals of scores that rest on few examples.

Means over examples and losses are bootstrapped over clients: examples of one client are alike, so
that an interval over single examples would be too narrow. Exact match, a share of yes or no, has
Wilson's interval, which is not empty at 0 % and 100 %.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import sqrt
from statistics import fmean, stdev

import numpy as np
import numpy.typing as npt

from flexlora.seeds import rng

DRAWS = 2000
_LEAST_CLIENTS = 2
_ROUNDING = 1e-9
_Z = 1.959964  # the 97.5 % quantile of the normal distribution
_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)

Sums = Sequence[tuple[float, float]]
"""Of each client a sum and the count by which it is divided."""


@dataclass(frozen=True)
class Interval:
    """The ends of a 95 % interval, in the unit of the score."""

    low: float
    high: float

    @property
    def has_zero(self) -> bool:
        """Whether no change at all lies in the interval of a change."""
        return self.low <= 0 <= self.high


def wilson(share: float, count: int) -> Interval:
    """Wilson's interval of a share between 0 and 1 of ``count`` examples, in percent."""
    middle = (share + _Z**2 / (2 * count)) / (1 + _Z**2 / count)
    half = _Z * sqrt(share * (1 - share) / count + _Z**2 / (4 * count**2)) / (1 + _Z**2 / count)
    # At 0 and 1 the ends are exact, but for rounding.
    return Interval(100 * min(max(middle - half, 0.0), share), 100 * max(middle + half, share))


def bootstrapped(after: Sums, before: Sums | None = None) -> Interval | None:
    """The interval of a mean over clients, or of its change since ``before``, of the same clients.

    ``DRAWS`` samples of clients with replacement, the same for equal numbers of clients. None with
    fewer than two clients, and where they are all alike: samples of equals show no uncertainty.
    """
    if len(after) < _LEAST_CLIENTS:
        return None
    means = _means(after)
    if before is not None:
        means = means - _means(before)
    if np.ptp(means) < _ROUNDING * max(np.abs(means).max(), 1.0):
        return None
    low, high = np.percentile(means, (2.5, 97.5))
    return Interval(float(low), float(high))


def mean_interval(values: Sequence[float]) -> Interval | None:
    """Student's t interval of the mean of a few values, such as one per seed; None for one value.

    It assumes that they are about normal; with two values it is wide, as it has to be.
    """
    if len(values) < 2:
        return None
    half = student_t(len(values) - 1) * stdev(values) / sqrt(len(values))
    return Interval(fmean(values) - half, fmean(values) + half)


def student_t(degrees: int) -> float:
    """The 97.5 % quantile of Student's t distribution, right to 0.2 %.

    Above ten degrees of freedom by the expansion of Cornish and Fisher.
    """
    if degrees <= len(_STUDENT):
        return _STUDENT[degrees - 1]
    first = (_Z**3 + _Z) / (4 * degrees)
    return _Z + first + (5 * _Z**5 + 16 * _Z**3 + 3 * _Z) / (96 * degrees**2)


def _means(sums: Sums) -> npt.NDArray[np.float64]:
    totals, counts = np.array(sums, dtype=np.float64).T
    samples = _samples(len(sums))
    means: npt.NDArray[np.float64] = (samples @ totals) / (samples @ counts)
    return means


@cache
def _samples(clients: int) -> npt.NDArray[np.float64]:
    """How often each client is drawn, a row per sample."""
    draw = rng(0, "bootstrap", clients)
    return draw.multinomial(clients, np.full(clients, 1 / clients), size=DRAWS).astype(np.float64)
