"""FedEx-LoRA (arXiv 2410.09432): means of the factors, and what they miss merged into the base.

``B = sum_k p_k B_k``, ``A = sum_k p_k A_k``, and the residual
``sum_k p_k B_k A_k - B A = sum_k p_k (B_k - B)(A_k - A)``, whose rank is at most (K - 1) r,
is sent factored and merged by everybody for good. Exact on every client.

Differs: weights by examples where the paper's are equal (``weights = "uniform"``); every
residual that a client has not merged yet is sent to it, so that it may miss rounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from flexlora.lowrank import Adapter, Factors
from flexlora.method import (
    Client,
    Decomposing,
    Download,
    Draw,
    Method,
    State,
    Upload,
    Weighted,
    Weights,
    factor_means,
    logged,
    summed,
    unmerged,
    weighted,
)


@dataclass(frozen=True)
class FedExLoRA(Method):
    """FedEx-LoRA. Unequal ranks are refused at start-up."""

    title = "FedEx-LoRA: factor means, residual merged into the base"
    paper = "arXiv 2410.09432"
    exact = True
    mixed_ranks = False
    by_module = True
    up = "r*(m+n)"
    down = "K*r*(m+n)"
    server = "one SVD of rank S; one of all so far for the export"

    weights: Weights = "examples"

    def handout(self, state: State, client: Client, draw: Draw) -> Download:
        """The factor means, and the residuals to merge."""
        download = super().handout(state, client, draw)
        return replace(download, merge=unmerged(state, client))

    def aggregate(self, state: State, uploads: Sequence[Upload]) -> State:
        """The means, and one SVD of rank (K - 1) r of each module's residual."""
        held, known = weighted(uploads, self.weights), state.adapters["global"]

        means = {module: factor_means(held(module)) for module in known}

        def residual(module: str) -> list[Weighted]:
            mean = means[module]
            return [(w, Factors(f.B - mean.B, f.A - mean.A)) for w, f in held(module)]

        ranks = {
            module: min((len(uploads) - 1) * mean.rank, *mean.shape)
            for module, mean in means.items()
        }
        entry, _ = Decomposing().best(residual, known, ranks)
        adapter = Adapter({m: f.to(known[m].B.dtype) for m, f in means.items()})
        return logged(state, entry, uploads, {"global": adapter})

    def update(self, state: State) -> Adapter:
        """All residuals and the means, as one SVD of each module."""
        return summed(state, state.adapters["global"], [state.adapters["global"]])
