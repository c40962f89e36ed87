"""FSLoRA (arXiv 2501.19389): each client trains a sketch, a random part of the global terms.

The global adapter has R terms. In each round a client of rank r draws r of them and trains
``B S A`` with ``S = R / r`` on the terms drawn, so that the sketch is the adapter on average.
What it changed comes back; the server adds the mean of the changes to ``B`` and ``A``, zero
where a client did not train.

From the abstract (unverified: that changes are averaged over all clients). The factor R / r
stands in ``B`` on the client and is taken out of the change again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flexlora.lowrank import Adapter, Factors
from flexlora.method import (
    Client,
    Download,
    Draw,
    Expected,
    Method,
    State,
    Upload,
    Weights,
    drawn_terms,
    numbered,
    weights_of,
)


@dataclass(frozen=True)
class FSLoRA(Method):
    """FSLoRA: random parts of the terms, nothing folded in, at a download of rank r."""

    title = "FSLoRA: random sketches of the global terms"
    paper = "arXiv 2501.19389"
    exact = False
    mixed_ranks = True
    by_module = True
    up = "r*(m+n)"
    down = "r*(m+n)"
    server = "sums of factors"

    weights: Weights = "examples"

    def handout(self, state: State, client: Client, draw: Draw) -> Download:
        """The terms drawn for this client in this round, scaled by R / r."""
        known, modules = state.adapters["global"], {}
        terms = drawn_terms(known, client, draw)
        for module, f in known.items():
            part = f.terms(terms[module])
            modules[module] = Factors(part.B * (f.rank / max(part.rank, 1)), part.A)
        return Download(Adapter(modules), terms=terms)

    def shares(self, start: Download, trained: Adapter) -> Adapter:
        """What training changed in each factor."""
        return Adapter(
            {
                m: Factors(f.B - start.adapter[m].B, f.A - start.adapter[m].A)
                for m, f in trained.items()
            }
        )

    def expects(
        self, state: State, client: Client, shapes: Mapping[str, tuple[int, int]]
    ) -> Mapping[str, Expected]:
        """As many numbered terms as the client's rank."""
        return numbered(state, client, shapes)

    def aggregate(self, state: State, uploads: Sequence[Upload]) -> State:
        """The weighted changes, added to their terms."""
        weights = weights_of(uploads, self.weights)
        modules = {}
        for module, last in state.adapters["global"].items():
            B, A = last.B.double().clone(), last.A.double().clone()
            for weight, upload in zip(weights, uploads, strict=True):
                at, change = list(upload.terms[module]), upload.adapter[module]
                B[:, at] += weight * change.B.double() * (change.rank / last.rank)
                A[at] += weight * change.A.double()
            modules[module] = Factors(B, A).to(last.B.dtype)
        return State({"global": Adapter(modules)}, state.facts)
