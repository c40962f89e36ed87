"""FedSVD (arXiv 2505.12805): only ``B`` is trained; the server renews the bases by an SVD.

``A`` is common, so the mean of ``B`` is the mean of the products. After every round
``B A = U S V'`` is handed out as ``B = U S`` and ``A = V'``: the same product, and an ``A`` with
orthonormal rows, so that no gradient of ``B`` is amplified.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from flexlora.lowrank import Adapter, Factors
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
    Turn,
    UploadSpec,
    Weighted,
    Weights,
    factor_spec,
    truncated,
)


@dataclass(frozen=True)
class FedSVD(Method):
    """FedSVD: ``B`` travels up, both down. Unequal ranks are refused at start-up."""

    info = Info(
        "FedSVD: averaged B, bases renewed by SVD",
        "arXiv 2505.12805",
        exact=True,
        up="r*m",
        down="r*(m+n)",
        server="one SVD of rank r",
        exempt={"gauge": "A is not trained"},
    )
    features = frozenset({Feature.PER_MODULE, Feature.SAME_FOR_EQUAL_RANKS})
    needs = frozenset({Mean.FACTORS})

    weights: Weights = "examples"

    def handout(self, state: State, client: Client, context: RoundContext) -> Download:
        """Both factors; ``B`` is to be trained."""
        return replace(truncated(state, client, context), factors="B")

    def upload_from(self, turn: Turn) -> Adapter:
        """Only ``B``."""
        return turn.trained.restricted("B")

    def upload_spec(self, state: State, client: Client, context: RoundContext) -> UploadSpec:
        """``B`` at the client's rank."""
        return factor_spec(client, context, "B")

    def aggregate(self, state: State, cohort: Cohort, context: RoundContext) -> State:
        """The mean of ``B``, and one SVD of rank r of each module's product."""

        def product(module: str) -> list[Weighted]:
            return [(1.0, Factors(cohort.factors(module).B, state.model[module].A.double()))]

        result = Truncation().best(product, state.model, context.ranks)
        return replace(state, model=result.adapter, per_module=result.per_module)
