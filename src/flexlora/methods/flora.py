"""FLoRA (arXiv 2409.05976): stack the factors, merge the stack into every client's base.

``[B_1 .. B_K]`` and ``[p_1 A_1; ..; p_K A_K]`` have the mean of the products as their
product, exactly and for any ranks. Every client merges the stack into its base for good and
starts the next round from a fresh adapter of its own rank.

Differs: a client is sent every stack that it has not merged yet, so that it may miss rounds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from flexlora.lowrank import Adapter
from flexlora.method import (
    Client,
    Cohort,
    Download,
    Feature,
    FreshAdapters,
    Info,
    Mean,
    Method,
    RoundContext,
    State,
    Weights,
    only_updates,
    total,
)


@dataclass(frozen=True)
class FLoRA(Method):
    """FLoRA: the download grows with the cohort, and fresh starts want few, long rounds."""

    info = Info(
        "FLoRA: stacked factors, merged into the base",
        "arXiv 2409.05976",
        exact=True,
        up="r*(m+n)",
        down="S*(m+n)",
        server="a stack; one SVD of all so far for the export",
    )
    features = frozenset({Feature.MIXED_RANKS, Feature.PER_MODULE})
    needs = frozenset({Mean.PRODUCTS})

    weights: Weights = "examples"

    def start(self, fresh: Adapter, context: RoundContext) -> State:
        """No update at all: the model has shapes and no component."""
        return State(fresh.first(dict.fromkeys(fresh, 0)))

    def handout(self, state: State, client: Client, context: RoundContext) -> Download:
        """The stacks to merge; of the adapter only its ranks."""
        return only_updates(state, client)

    def prepare(
        self, download: Download, private: Mapping[str, Adapter], fresh: FreshAdapters
    ) -> Download:
        """A fresh adapter at the client's ranks."""
        return replace(download, adapter=fresh.own(download.ranks))

    def aggregate(self, state: State, cohort: Cohort, context: RoundContext) -> State:
        """The stack of all uploads, of their summed rank; a concatenation."""
        stack = {
            module: cohort.products(module).stacked(last.B.dtype)
            for module, last in state.model.items()
        }
        log = state.merge_log.after(context.round, cohort.clients, Adapter(stack))
        return replace(state, merge_log=log)

    def global_adapter(self, state: State, context: RoundContext) -> Adapter:
        """All stacks so far, as one SVD of each module."""
        return total(state.merge_log.updates.values(), state.model)
