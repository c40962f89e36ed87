"""RoLoRA (arXiv 2409.02346): rounds that train ``B`` alternate with rounds that train ``A``.

The factor that is not trained is common to all clients, so the mean of the other is the mean
of the products. The first round trains ``B``: with ``B = 0`` the gradient of ``A`` is zero.

Differs: both factors travel down, so that a client that missed a round needs nothing special;
only the trained one travels up.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from flexlora.lowrank import Adapter, FactorNames, Factors
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
    Turn,
    UploadSpec,
    Weights,
    factor_spec,
    truncated,
)


@dataclass(frozen=True)
class RoLoRA(Method):
    """RoLoRA. Unequal ranks are refused at start-up."""

    info = Info(
        "RoLoRA: B and A in turn",
        "arXiv 2409.02346",
        exact=True,
        up="r*m or r*n",
        down="r*(m+n)",
        server="sums of factors",
        exempt={"gauge": "one factor is trained at a time"},
    )
    features = frozenset({Feature.PER_MODULE, Feature.SAME_FOR_EQUAL_RANKS})
    needs = frozenset({Mean.FACTORS})

    weights: Weights = "examples"

    def handout(self, state: State, client: Client, context: RoundContext) -> Download:
        """The model, of which this round trains one factor."""
        return replace(truncated(state, client, context), factors=_trained_in(context.round))

    def upload_from(self, turn: Turn) -> Adapter:
        """The factor that was trained."""
        return turn.trained.restricted(turn.start.factors)

    def upload_spec(self, state: State, client: Client, context: RoundContext) -> UploadSpec:
        """The factor that this round trains."""
        return factor_spec(client, context, _trained_in(context.round))

    def aggregate(self, state: State, cohort: Cohort, context: RoundContext) -> State:
        """The mean of the factor that was trained."""
        model = {}
        for module, last in state.model.items():
            mean = cohort.factors(module).to(last.B.dtype)
            trains_B = _trained_in(context.round) == "B"
            model[module] = Factors(mean.B, last.A) if trains_B else Factors(last.B, mean.A)
        return replace(state, model=Adapter(model))


def _trained_in(round: int) -> FactorNames:
    return "B" if round % 2 else "A"
