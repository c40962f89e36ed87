"""FedSVD (arXiv 2505.12805): ``B`` alone is trained; the server turns ``B A`` into an SVD anew.

``A`` is common, so the mean of ``B`` is the mean of the products. After every round
``B A = U S V'`` is handed out as ``B = U S`` and ``A = V'``: the same product, and an ``A`` with
orthonormal rows, so that no gradient of ``B`` is amplified.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from flexlora.lowrank import Adapter, Factors
from flexlora.method import (
    Client,
    Decomposing,
    Download,
    Draw,
    Expected,
    Method,
    State,
    Upload,
    Weighted,
    Weights,
    factor_means,
    half_expected,
    weighted,
)


@dataclass(frozen=True)
class FedSVD(Method):
    """FedSVD: ``B`` travels up, both down. Unequal ranks are refused at start-up."""

    title = "FedSVD: means of B, bases renewed by SVD"
    paper = "arXiv 2505.12805"
    exact = True
    mixed_ranks = False
    by_module = True
    up = "r*m"
    down = "r*(m+n)"
    server = "one SVD of rank r"

    weights: Weights = "examples"

    def handout(self, state: State, client: Client, draw: Draw) -> Download:
        """Both factors; ``B`` is to be trained."""
        return replace(super().handout(state, client, draw), halves="B")

    def shares(self, start: Download, trained: Adapter) -> Adapter:
        """``B`` alone."""
        return trained.half("B")

    def expects(
        self, state: State, client: Client, shapes: Mapping[str, tuple[int, int]]
    ) -> Mapping[str, Expected]:
        """``B`` at the client's rank."""
        return half_expected(client, shapes, "B")

    def aggregate(self, state: State, uploads: Sequence[Upload]) -> State:
        """The mean of ``B``, and one SVD of rank r of each module's product."""
        held, known = weighted(uploads, self.weights), state.adapters["global"]

        def terms(module: str) -> list[Weighted]:
            return [(1.0, Factors(factor_means(held(module)).B, known[module].A.double()))]

        adapter, facts = Decomposing().best(terms, known, state.facts["ranks"])
        return State({"global": adapter}, {**state.facts, **facts})
