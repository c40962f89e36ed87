"""The geometric median of the clients' changes (RFA: Pillutla et al., arXiv 1912.13445).

It minimises the weighted sum of the distances to the changes, so that clients with less than half
of all weight cannot move it arbitrarily far. It is a weighted mean itself, with weights in inverse
proportion to the distance, found by Weiszfeld's iteration on the Gram matrix of the changes.

Where the data of honest clients differ, their changes are as far from each other as from an
attack's, and the median alone helps little. So clients that point against the others are left
out first, at most as many as attackers are expected: those whose support is negative, the mean
cosine of a change to the others'. A client's largest cosines do not count, as many as attackers
are expected: colluding clients cannot support each other.

Differs: distances are between changes relative to what was handed out, all modules together,
products where the method averages products; the paper leaves nobody out; the first iterate is not
the mean, which a single client can put anywhere, but starts at the client nearest to all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flexlora.errors import ConfigError, ProtocolError
from flexlora.lowrank import cosines, squared_distances
from flexlora.method.averager import Averager, Mean, Weights
from flexlora.method.averaging import WeightedCohort, reweighted
from flexlora.method.client_changes import Changes
from flexlora.method.interface import RoundContext, Upload

_NEAREST = 1e-6
"""The least distance that counts, relative to the usual one: a client at the median itself would
have all weight."""


@dataclass(frozen=True)
class GeometricMedian(Averager):
    """The geometric median of the changes that do not point against the others.

    ``attackers`` is the share of a round's clients that may be malicious: at most so many are left
    out. With 0 it is the geometric median of all changes.
    At most ``iterations`` steps, until no client's share changes by more than ``tolerance``.
    """

    title = "geometric median"
    offers = frozenset(Mean) - {Mean.UPLOADS, Mean.AUX_FACTORS}
    accepts = frozenset({"examples", "uniform"})
    least = 3

    attackers: float = 0.2
    iterations: int = 1000
    tolerance: float = 1e-9

    def __post_init__(self) -> None:
        if not 0 <= self.attackers < 0.5:
            raise ConfigError(f"attackers is a share in [0, 0.5), got {self.attackers}.")
        if self.iterations < 1 or not 0 < self.tolerance < 1:
            raise ConfigError(
                "iterations is at least 1 and tolerance in (0, 1), got "
                f"{self.iterations} and {self.tolerance}."
            )

    def cohort(
        self,
        uploads: Sequence[Upload],
        weights: Weights,
        context: RoundContext,
        changes: Changes | None = None,
    ) -> WeightedCohort:
        """Weighted in inverse proportion to the distance to the median; scores are distances."""
        if changes is None:
            raise ProtocolError(f"The averager {self.title!r} needs the clients' changes.")
        gram = changes.gram(list(context.ranks))
        kept = supported(gram, self.expected(len(uploads)))
        declared = changes.declared[kept] / changes.declared[kept].sum()
        shares = torch.zeros_like(changes.declared)
        shares[kept], _ = median(gram[kept][:, kept], declared, self.iterations, self.tolerance)
        return reweighted(uploads, shares.tolist(), _distances(gram, shares).tolist())

    def expected(self, uploads: int) -> int:
        """How many attackers are expected among so many uploads: less than half."""
        return min(math.ceil(self.attackers * uploads - 1e-9), (uploads - 1) // 2)


def supported(gram: Tensor, most: int) -> Tensor:
    """The places, ascending, of the vectors but those whose support is negative, at most ``most``.

    ``gram`` (n, n) has the inner products of the vectors; those of the least support go first.
    """
    values = support(gram, most)
    least = values.argsort(stable=True)[:most]
    kept = torch.ones(len(gram), dtype=torch.bool)
    kept[least[values[least] < 0]] = False
    return kept.nonzero()[:, 0]


def support(gram: Tensor, left_out: int) -> Tensor:
    """The mean cosine (n,) of each vector to the others, without its ``left_out`` largest.

    ``gram`` (n, n) has the inner products of the vectors; ``left_out`` is at most n - 2.
    """
    others = cosines(gram).fill_diagonal_(torch.inf).sort(dim=1, descending=True).values[:, 1:]
    return others[:, left_out:].mean(1)


def median(
    gram: Tensor, declared: Tensor, iterations: int, tolerance: float
) -> tuple[Tensor, Tensor]:
    """Each vector's share (n,) in the geometric median, and its distance (n,) to it.

    ``gram`` (n, n) has the inner products of the vectors, ``declared`` (n,) their weights, which
    add up to 1.
    """
    apart = squared_distances(gram).sqrt()
    center = int((apart @ declared).argmin())
    nearest = apart[center]
    usual = nearest.median()
    if usual == 0:
        # At least half of the vectors are the same: that one is the median.
        usual = nearest[nearest > 0].min() if (nearest > 0).any() else torch.ones_like(usual)
    # Relative to the nearest: else distances would be differences of the largest norms.
    gram = gram - gram[center] - gram[:, center, None] + gram[center, center]
    shares, least = _shares(declared, nearest, usual), _NEAREST * usual
    for _ in range(iterations):
        before, shares = shares, _shares(declared, _distances(gram, shares), least)
        if (shares - before).abs().max() <= tolerance:
            break
    return shares, _distances(gram, shares)


def _distances(gram: Tensor, shares: Tensor) -> Tensor:
    """The distance (n,) of each vector to the sum of all at these shares."""
    inner = gram @ shares
    return (gram.diagonal() - 2 * inner + shares @ inner).clamp_min(0).sqrt()


def _shares(declared: Tensor, distances: Tensor, least: Tensor) -> Tensor:
    inverse = declared / distances.clamp_min(least)
    return inverse / inverse.sum()
