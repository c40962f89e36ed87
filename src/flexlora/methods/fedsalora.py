"""FedSA-LoRA (arXiv 2410.01463): ``A`` is shared and averaged, ``B`` never leaves its client.

Both are trained; the server sees and averages ``A`` alone. Each client's model is its own:
the common ``A`` with the ``B`` that it keeps; a client that never trained has ``B = 0`` and so
the base model.
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
    at_ranks,
    factor_means,
    half_expected,
    weighted,
)


@dataclass(frozen=True)
class FedSALoRA(Method):
    """FedSA-LoRA. Unequal ranks are refused at start-up. There is no global model."""

    title = "FedSA-LoRA: A shared, B private"
    paper = "arXiv 2410.01463"
    exact = False
    mixed_ranks = False
    by_module = True
    up = "r*n"
    down = "r*n"
    server = "sums of factors"
    personal = True

    weights: Weights = "examples"

    def handout(self, state: State, client: Client, draw: Draw) -> Download:
        """``A`` alone."""
        return Download(at_ranks(state.adapters["global"], client.ranks, draw).half("A"))

    def receive(self, download: Download, kept: Adapter | None, fresh: Fresh) -> Download:
        """``A`` as it came, beside the client's own ``B``, at first zero."""
        whole = {}
        for module, f in download.adapter.items():
            out = fresh.shapes[module][0]
            mine = None if kept is None else kept.get(module)  # it may train more than it did
            B = torch.zeros(out, f.rank) if mine is None else mine.B
            # What never travels is not rounded as what travels is.
            dtype = torch.promote_types(f.A.dtype, B.dtype)
            whole[module] = Factors(B.to(dtype), f.A.to(dtype))
        return replace(download, adapter=Adapter(whole))

    def shares(self, start: Download, trained: Adapter) -> Adapter:
        """``A`` alone."""
        return trained.half("A")

    def keeps(self, start: Download, trained: Adapter) -> Adapter:
        """``B``."""
        return trained.half("B")

    def expects(
        self, state: State, client: Client, shapes: Mapping[str, tuple[int, int]]
    ) -> Mapping[str, Expected]:
        """``A`` at the client's rank."""
        return half_expected(client, shapes, "A")

    def aggregate(self, state: State, uploads: Sequence[Upload]) -> State:
        """The mean of ``A``."""
        held = weighted(uploads, self.weights)
        modules = {}
        for module, last in state.adapters["global"].items():
            modules[module] = Factors(last.B, factor_means(held(module)).A.to(last.A.dtype))
        return State({"global": Adapter(modules)}, state.facts)
