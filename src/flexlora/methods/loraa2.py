"""LoRA-A2 (arXiv 2410.22815): one half in turn, and of it the terms that matter most.

Odd rounds train ``B``, at five times the learning rate, even rounds ``A``. A client trains one
probing epoch on all terms, scores each term of each module by ``|change of its vector| *
|its other vector|``, and keeps the best of the whole model: as many as its ranks add up to.
Only those are then trained, from the same start, and their changes sent. The server adds the
weighted mean of the changes, zero where a client did not train: exact, as the other half is
common.

Differs: the global rank is the largest rank of any client, where the paper's may be larger
than all budgets. The paper's prose and its algorithm disagree on which half comes first;
``B`` must, as the gradient of ``A`` is zero while ``B = 0``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from flexlora.lowrank import Adapter, Factors, Halves
from flexlora.method import (
    Client,
    Download,
    Draw,
    Expected,
    Method,
    State,
    Upload,
    Weights,
    half_shape,
    weights_of,
)


@dataclass(frozen=True)
class LoRAA2(Method):
    """LoRA-A2. ``rate_of_B`` multiplies the learning rate where ``B`` is trained."""

    title = "LoRA-A2: halves in turn, the best terms of the model"
    paper = "arXiv 2410.22815"
    exact = True
    mixed_ranks = True
    by_module = True
    up = "b*m or b*n"
    down = "R*(m+n)"
    server = "sums of factors"
    probes = True

    rate_of_B: float = 5.0
    weights: Weights = "examples"

    def handout(self, state: State, client: Client, draw: Draw) -> Download:
        """The whole global adapter, and how many of its terms the client may train."""
        half = _turn(state)
        rate = self.rate_of_B if half == "B" else 1.0
        budget = sum(client.ranks.values())
        return Download(state.adapters["global"], halves=half, rate=rate, facts={"budget": budget})

    def choose(self, download: Download, probed: Adapter) -> Mapping[str, Sequence[int]]:
        """The terms that the probing epoch changed most."""
        scores, places = [], []
        for module, f in download.adapter.items():
            change = probed[module].B - f.B.float(), probed[module].A - f.A.float()
            moved, still = (change[0].norm(dim=0), f.A.float().norm(dim=1))
            if download.halves == "A":
                moved, still = change[1].norm(dim=1), f.B.float().norm(dim=0)
            scores.append(moved * still)
            places += [(module, term) for term in range(f.rank)]
        best = torch.cat(scores).argsort(descending=True, stable=True)
        chosen: dict[str, list[int]] = {module: [] for module in download.adapter}
        for place in sorted(best[: download.facts["budget"]].tolist()):
            module, term = places[place]
            chosen[module].append(term)
        return chosen

    def shares(self, start: Download, trained: Adapter) -> Adapter:
        """The changes of the terms trained, of the half trained."""
        return Adapter(
            {
                m: Factors(f.B - start.adapter[m].B, f.A - start.adapter[m].A).half(start.halves)
                for m, f in trained.items()
            }
        )

    def expects(
        self, state: State, client: Client, shapes: Mapping[str, tuple[int, int]]
    ) -> Mapping[str, Expected]:
        """Of each module any number of terms, of the half that it is the turn of."""
        turn, ranks = _turn(state), state.facts["ranks"]
        return {
            m: Expected(half_shape(shape, turn), 0, ranks[m], ranks[m])
            for m, shape in shapes.items()
        }

    def aggregate(self, state: State, uploads: Sequence[Upload]) -> State:
        """The global adapter with the weighted changes added to one half."""
        weights, turn = weights_of(uploads, self.weights), _turn(state)
        modules = {}
        for module, last in state.adapters["global"].items():
            B, A = last.B.double().clone(), last.A.double().clone()
            for weight, upload in zip(weights, uploads, strict=True):
                at, change = list(upload.terms[module]), upload.adapter[module]
                if turn == "B":
                    B[:, at] += weight * change.B.double()
                else:
                    A[at] += weight * change.A.double()
            modules[module] = Factors(B, A).to(last.B.dtype)
        rounds = state.facts.get("rounds", 0) + 1
        return State({"global": Adapter(modules)}, {**state.facts, "rounds": rounds})


def _turn(state: State) -> Halves:
    return "A" if state.facts.get("rounds", 0) % 2 else "B"
