"""FFA-LoRA (arXiv 2403.12313), nested: one frozen ``A`` for all, of which clients use a part.

``A`` is drawn once from the run's seed and never trained; a client of rank r uses its first
r rows, trains its ``B`` and sends it alone. As ``A`` is common, the mean of ``B`` is the mean
of the products. At unequal ranks each column of ``B`` is averaged over the clients that hold
it, which keeps this true term by term.

Differs: the paper has equal ranks only; ``A`` does not travel, the client draws it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from flexlora.lowrank import Adapter, Factors
from flexlora.method import (
    Client,
    Download,
    Draw,
    Expected,
    Fresh,
    Method,
    State,
    Upload,
    Weights,
    half_expected,
    rank_wise_means,
    weighted,
)


@dataclass(frozen=True)
class FFALoRA(Method):
    """FFA-LoRA: half the traffic. It wants its own, mostly higher, learning rate."""

    title = "FFA-LoRA: one frozen A, means of B"
    paper = "arXiv 2403.12313"
    exact = True
    rank_wise = True
    mixed_ranks = True
    by_module = True
    fixed_frame = True
    up = "r*m"
    down = "r*m"
    server = "sums of factors"

    weights: Weights = "examples"

    def handout(self, state: State, client: Client, draw: Draw) -> Download:
        """The first columns of ``B``."""
        return Download(state.adapters["global"].first(client.ranks).half("B"), halves="B")

    def receive(self, download: Download, kept: Adapter | None, fresh: Fresh) -> Download:
        """``B`` as it came, beside the first rows of the common ``A``."""
        A = fresh.common(download.adapter.ranks)
        whole = {}
        for module, f in download.adapter.items():
            # A is the server's to the bit: what does not travel is not rounded.
            dtype = torch.promote_types(f.B.dtype, torch.float32)
            whole[module] = Factors(f.B.to(dtype), A[module].A.to(dtype))
        return replace(download, adapter=Adapter(whole))

    def shares(self, start: Download, trained: Adapter) -> Adapter:
        """``B`` alone."""
        return trained.half("B")

    def expects(
        self, state: State, client: Client, shapes: Mapping[str, tuple[int, int]]
    ) -> Mapping[str, Expected]:
        """``B`` at the client's rank."""
        return half_expected(client, shapes, "B")

    def aggregate(self, state: State, uploads: Sequence[Upload]) -> State:
        """The mean of each column over its holders; one that nobody holds stays."""
        held = weighted(uploads, self.weights)
        modules = {}
        for module, last in state.adapters["global"].items():
            B = rank_wise_means(held(module), last.half("B")).B
            modules[module] = Factors(B.to(last.B.dtype), last.A)
        return State({"global": Adapter(modules)}, state.facts)
