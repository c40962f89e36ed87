"""Trust in proportion to one client's change (after FLTrust: Cao et al., arXiv 2012.13995).

A client of the server's own, with rows that it trusts, takes part in every round. Others count by
the cosine of their change to its change, and not at all where that is negative; a change larger
than its change counts in inverse proportion to its size.

Differs: the paper's server trains on its rows itself, and its update is not averaged; the paper
gives every update the size of the server's, where here a smaller one is not enlarged, so that the
result is a weighted mean of uploads; the weights of the method are kept, as a factor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flexlora.errors import ConfigError, ProtocolError
from flexlora.lowrank import cosines, norms
from flexlora.method.averager import Averager, Mean, Weights
from flexlora.method.averaging import WeightedCohort, reweighted
from flexlora.method.client_changes import Changes
from flexlora.method.interface import RoundContext, Upload

_NOTHING = 1e-12
"""A squared change below this share of the usual one is rounding."""


@dataclass(frozen=True)
class FLTrust(Averager):
    """FLTrust. ``trusted`` is the name of the client whose rows the server trusts."""

    title = "FLTrust"
    offers = frozenset(Mean) - {Mean.UPLOADS, Mean.AUX_FACTORS}
    accepts = frozenset({"examples", "uniform"})

    trusted: str = ""

    def __post_init__(self) -> None:
        if not self.trusted:
            raise ConfigError(
                "trusted is missing: the averager 'fltrust' compares all clients with one that has "
                "rows of the server's own; set averager.trusted to the name of such a client."
            )

    @property
    def required(self) -> frozenset[str]:
        """The trusted client."""
        return frozenset({self.trusted})

    def cohort(
        self,
        uploads: Sequence[Upload],
        weights: Weights,
        context: RoundContext,
        changes: Changes | None = None,
    ) -> WeightedCohort:
        """Weighted by the trust in each client; scores are cosines.

        Raises:
            ProtocolError: the trusted client has sent nothing, or has changed nothing.
        """
        if changes is None:
            raise ProtocolError(f"The averager {self.title!r} needs the clients' changes.")
        names = [upload.client for upload in uploads]
        if self.trusted not in names:
            raise ProtocolError(
                f"The trusted client {self.trusted!r} has no upload in round {context.round}, so "
                "there is nothing to compare others with; look at its loss in the journal, or set "
                "averager.trusted to another client."
            )
        gram, place = changes.gram(list(context.ranks)), names.index(self.trusted)
        if not gram[place, place] > _NOTHING * gram.diagonal().median():
            raise ProtocolError(
                f"The trusted client {self.trusted!r} has changed nothing in round "
                f"{context.round}; give it rows to train on."
            )
        shares = changes.declared * trust(gram, place)
        return reweighted(uploads, shares.tolist(), cosines(gram)[place].tolist())


def trust(gram: Tensor, trusted: int) -> Tensor:
    """How far each vector (n,) counts: its cosine to the trusted one, less if it is larger."""
    sizes = norms(gram)
    scale = torch.where(sizes > sizes[trusted], sizes[trusted] / sizes, 1.0)
    return cosines(gram)[trusted].clamp_min(0) * scale
