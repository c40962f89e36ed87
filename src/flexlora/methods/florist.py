"""FLoRIST (arXiv 2506.09199): FLoRA's stack, cut by SVD to a share of its energy.

Of each module's mean of products the smallest rank is kept whose squared singular values
reach ``energy`` of all; that one pair is sent to everybody, who merges it into the base and
starts afresh at the own rank, as in FLoRA (the paper's appendix). ``energy`` 1 is FLoRA.

Differs: one QR-based SVD in place of the paper's three, with the same result. The paper
chooses the threshold for each model and data set between 0.80 and 0.99; the default here is
one number in between.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from flexlora.errors import ConfigError
from flexlora.lowrank import Adapter, Factors
from flexlora.method import (
    Client,
    Decomposing,
    Download,
    Draw,
    Fresh,
    Method,
    State,
    Upload,
    Weights,
    hollow,
    in_parallel,
    logged,
    summed,
    unmerged,
    weighted,
)


@dataclass(frozen=True)
class FLoRIST(Method):
    """FLoRIST. ``energy`` is the paper's threshold tau, of the squared singular values."""

    title = "FLoRIST: stack cut to its energy, merged into the base"
    paper = "arXiv 2506.09199"
    exact = False
    mixed_ranks = True
    by_module = True
    up = "r*(m+n)"
    down = "p*(m+n)"
    server = "one SVD of rank S; one of all so far for the export"

    energy: float = 0.9
    weights: Weights = "examples"

    def __post_init__(self) -> None:
        if not 0 < self.energy <= 1:
            raise ConfigError(f"energy is a share in (0, 1], got {self.energy}.")

    def start(self, adapter: Adapter) -> State:
        """No update at all; ``global`` tells shapes alone."""
        nothing = adapter.first(dict.fromkeys(adapter, 0))
        return State({"global": nothing}, {"ranks": adapter.ranks})

    def handout(self, state: State, client: Client, draw: Draw) -> Download:
        """The updates to merge; of the adapter only its ranks."""
        return Download(hollow(client.ranks), merge=unmerged(state, client))

    def receive(self, download: Download, kept: Adapter | None, fresh: Fresh) -> Download:
        """A fresh adapter at the client's ranks."""
        return replace(download, adapter=fresh.own(download.adapter.ranks))

    def aggregate(self, state: State, uploads: Sequence[Upload]) -> State:
        """One truncated SVD of each module's mean; ranks differ by module."""
        held, known = weighted(uploads, self.weights), state.adapters["global"]

        def cut(module: str) -> Factors:
            terms = held(module)
            most = min(sum(f.rank for _, f in terms), *known[module].shape)
            svd = Decomposing().svd(terms, known[module], most)
            return svd.factors(svd.rank_for(self.energy)).to(known[module].B.dtype)

        found = in_parallel(cut, list(known))
        entry = Adapter(dict(zip(known, found, strict=True)))
        return logged(state, entry, uploads, {"global": known})

    def update(self, state: State) -> Adapter:
        """All updates so far, as one SVD of each module."""
        return summed(state, state.adapters["global"])
