"""FLoRA (arXiv 2409.05976): stack the factors, merge the stack into everybody's base.

``[B_1 .. B_K]`` and ``[p_1 A_1; ..; p_K A_K]`` have the mean of the products as their
product, exactly and for any ranks. Every client merges the stack into its base for good and
starts the next round from a fresh adapter of its own rank.

Differs: a client is sent every stack that it has not merged yet, so that it may miss rounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from flexlora.lowrank import Adapter, LowRankSum
from flexlora.method import (
    Client,
    Download,
    Draw,
    Fresh,
    Method,
    State,
    Upload,
    Weights,
    hollow,
    logged,
    summed,
    unmerged,
    weighted,
)


@dataclass(frozen=True)
class FLoRA(Method):
    """FLoRA: the download grows with the cohort, and fresh starts want few, long rounds."""

    title = "FLoRA: stacked factors, merged into the base"
    paper = "arXiv 2409.05976"
    exact = True
    mixed_ranks = True
    by_module = True
    up = "r*(m+n)"
    down = "S*(m+n)"
    server = "a stack; one SVD of all so far for the export"

    weights: Weights = "examples"

    def start(self, adapter: Adapter) -> State:
        """No update at all; ``global`` tells shapes alone."""
        nothing = adapter.first(dict.fromkeys(adapter, 0))
        return State({"global": nothing}, {"ranks": adapter.ranks})

    def handout(self, state: State, client: Client, draw: Draw) -> Download:
        """The stacks to merge; of the adapter only its ranks."""
        return Download(hollow(client.ranks), merge=unmerged(state, client))

    def receive(self, download: Download, kept: Adapter | None, fresh: Fresh) -> Download:
        """A fresh adapter at the client's ranks."""
        return replace(download, adapter=fresh.own(download.adapter.ranks))

    def aggregate(self, state: State, uploads: Sequence[Upload]) -> State:
        """The stack of all uploads, of their summed rank; a concatenation."""
        held = weighted(uploads, self.weights)
        stack = {
            module: LowRankSum.of(held(module)).stacked(last.B.dtype)
            for module, last in state.adapters["global"].items()
        }
        return logged(state, Adapter(stack), uploads, {"global": state.adapters["global"]})

    def update(self, state: State) -> Adapter:
        """All stacks so far, as one SVD of each module."""
        return summed(state, state.adapters["global"])
