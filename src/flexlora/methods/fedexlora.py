"""FedEx-LoRA (arXiv 2410.09432): averaged factors; what they miss is merged into the base.

``B = sum_k p_k B_k``, ``A = sum_k p_k A_k``, and the residual
``sum_k p_k B_k A_k - B A = sum_k p_k (B_k - B)(A_k - A)``, whose rank is at most (K - 1) r,
is sent factored and merged by every client for good. Exact on every client.

Differs: weights by examples where the paper's are equal (``weights = "uniform"``); every
residual that a client has not merged yet is sent to it, so that it may miss rounds.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import chain

from flexlora.lowrank import Adapter
from flexlora.method import (
    Client,
    Cohort,
    Download,
    Feature,
    Info,
    Mean,
    Method,
    RoundContext,
    State,
    Truncation,
    Weighted,
    Weights,
    total,
    truncated,
)


@dataclass(frozen=True)
class FedExLoRA(Method):
    """FedEx-LoRA. Unequal ranks are refused at start-up."""

    info = Info(
        "FedEx-LoRA: averaged factors, residual merged into the base",
        "arXiv 2410.09432",
        exact=True,
        up="r*(m+n)",
        down="K*r*(m+n)",
        server="one SVD of rank S; one of all so far for the export",
    )
    features = frozenset({Feature.PER_MODULE})
    needs = frozenset({Mean.FACTORS, Mean.PRODUCTS})

    weights: Weights = "examples"

    def handout(self, state: State, client: Client, context: RoundContext) -> Download:
        """The averaged factors, and the residuals to merge."""
        download = truncated(state, client, context)
        return replace(download, base_updates=state.merge_log.pending(client.id))

    def aggregate(self, state: State, cohort: Cohort, context: RoundContext) -> State:
        """The averages, and one SVD of each module's residual, of rank (K - 1) r at most."""
        factors = {module: cohort.factors(module) for module in state.model}

        def residual(module: str) -> Iterable[Weighted]:
            return chain(cohort.product_terms(module), [(-1.0, factors[module])])

        ranks = {
            module: min((len(cohort.clients) - 1) * mean.rank, *mean.shape)
            for module, mean in factors.items()
        }
        update = Truncation().best(residual, state.model, ranks).adapter
        model = Adapter({m: f.to(state.model[m].B.dtype) for m, f in factors.items()})
        log = state.merge_log.after(context.round, cohort.clients, update)
        return replace(state, model=model, merge_log=log)

    def global_adapter(self, state: State, context: RoundContext) -> Adapter:
        """All residuals and the averaged factors, as one SVD of each module."""
        return total([*state.merge_log.updates.values(), state.model], state.model)
