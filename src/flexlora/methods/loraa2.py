"""LoRA-A2 (arXiv 2410.22815): one factor in turn, and of it the components that matter most.

Odd rounds train ``B``, at five times the learning rate, even rounds ``A``. A client trains one
probing epoch on all components, scores each component of each module by ``|change of its vector| *
|its other vector|``, and keeps the best of the whole model: as many as its ranks add up to.
Only those are then trained, from the same start, and their changes sent. The server adds the
weighted mean of the changes, zero where a client did not train: exact, as the other factor is
common.

Differs: the global rank is the largest rank of any client, where the paper's may be larger
than all budgets. The paper's prose and its algorithm disagree on which factor comes first;
``B`` must, as the gradient of ``A`` is zero while ``B = 0``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from flexlora.lowrank import Adapter, FactorNames
from flexlora.method import (
    Client,
    Cohort,
    Download,
    Feature,
    Info,
    Mean,
    Method,
    ModuleSpec,
    RoundContext,
    State,
    Turn,
    UploadSpec,
    Weights,
    changes,
    factor_shape,
)


@dataclass(frozen=True)
class LoRAA2(Method):
    """LoRA-A2. ``rate_of_B`` multiplies the learning rate where ``B`` is trained."""

    info = Info(
        "LoRA-A2: factors in turn, the best components of the model",
        "arXiv 2410.22815",
        exact=True,
        up="b*m or b*n",
        down="R*(m+n)",
        server="sums of factors",
        exempt={"gauge": "one factor is trained at a time"},
    )
    features = frozenset(
        {Feature.MIXED_RANKS, Feature.PER_MODULE, Feature.PROBES, Feature.SAME_FOR_EQUAL_RANKS}
    )
    needs = frozenset({Mean.NUMBERED_CHANGES})

    rate_of_B: float = 5.0
    weights: Weights = "examples"

    def handout(self, state: State, client: Client, context: RoundContext) -> Download:
        """The whole model, and how many of its components the client may train."""
        factor = _trained_in(context.round)
        rate = self.rate_of_B if factor == "B" else 1.0
        budget = {"budget": sum(client.ranks.values())}
        return Download(state.model, factors=factor, learning_rate_factor=rate, ints=budget)

    def select(self, download: Download, probed: Adapter) -> Mapping[str, Sequence[int]]:
        """The components that the probing epoch changed most."""
        scores, places = [], []
        for module, f in download.adapter.items():
            moved = (probed[module].B - f.B.float()).norm(dim=0)
            fixed = f.A.float().norm(dim=1)
            if download.factors == "A":
                moved = (probed[module].A - f.A.float()).norm(dim=1)
                fixed = f.B.float().norm(dim=0)
            scores.append(moved * fixed)
            places += [(module, number) for number in range(f.rank)]
        best = torch.cat(scores).argsort(descending=True, stable=True)
        ids: dict[str, list[int]] = {module: [] for module in download.adapter}
        for place in sorted(best[: download.ints["budget"]].tolist()):
            module, number = places[place]
            ids[module].append(number)
        return ids

    def upload_from(self, turn: Turn) -> Adapter:
        """The changes of the components trained, of the factor trained."""
        return changes(turn.start.adapter, turn.trained).restricted(turn.start.factors)

    def upload_spec(self, state: State, client: Client, context: RoundContext) -> UploadSpec:
        """Of each module any number of components, of the factor that this round trains."""
        factor, ranks = _trained_in(context.round), context.ranks
        return UploadSpec(
            {
                m: ModuleSpec(factor_shape(shape, factor), 0, ranks[m], ranks[m])
                for m, shape in context.shapes.items()
            }
        )

    def untrained(self, download: Download, context: RoundContext) -> Adapter:
        """Nothing: changes are sent."""
        return Adapter({})

    def aggregate(self, state: State, cohort: Cohort, context: RoundContext) -> State:
        """The model with the weighted changes added to one factor."""
        model = {
            m: cohort.numbered_changes(m, last).to(last.B.dtype) for m, last in state.model.items()
        }
        return replace(state, model=Adapter(model))


def _trained_in(round: int) -> FactorNames:
    return "B" if round % 2 else "A"
