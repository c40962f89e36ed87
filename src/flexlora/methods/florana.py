"""FLoRA-NA (arXiv 2509.26399): mixed factors, with the mixture fitted to the mean of products.

``A = sum_u a_u A_u`` and ``B = sum_u b_u B_u`` with the ``a`` and ``b`` that bring ``B A``
nearest to ``W = sum_k p_k B_k A_k``: two least-squares problems in K unknowns in turn, from
the clients' shares on. All that they need are the r x r products of factors, never ``W``.

From the abstract (unverified: that the factors are linear combinations). Differs: the
solver is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flexlora.errors import ConfigError
from flexlora.lowrank import Adapter, Factors
from flexlora.method import Method, State, Upload, Weighted, Weights, factor_means, weighted


@dataclass(frozen=True)
class FLoRANA(Method):
    """FLoRA-NA. ``sweeps`` is how often both mixtures are fitted.

    Unequal ranks are refused at start-up.
    """

    title = "FLoRA-NA: nearest mixtures of the factors"
    paper = "arXiv 2509.26399"
    exact = False
    mixed_ranks = False
    by_module = True
    up = "r*(m+n)"
    down = "r*(m+n)"
    server = "K^2 products of factors, systems of K unknowns"

    sweeps: int = 10
    weights: Weights = "examples"

    def __post_init__(self) -> None:
        if self.sweeps < 1:
            raise ConfigError(f"sweeps is at least 1, got {self.sweeps}.")

    def aggregate(self, state: State, uploads: Sequence[Upload]) -> State:
        """K^2 products of factors of each module, and 2 ``sweeps`` systems of K unknowns."""
        held = weighted(uploads, self.weights)
        modules = {}
        for module, last in state.adapters["global"].items():
            modules[module] = self._mixed(held(module)).to(last.B.dtype)
        return State({"global": Adapter(modules)}, state.facts)

    def _mixed(self, held: Sequence[Weighted]) -> Factors:
        p = torch.tensor([w for w, _ in held], dtype=torch.float64)
        B = torch.stack([f.B.double() for _, f in held])
        A = torch.stack([f.A.double() for _, f in held])
        if not (B.any() and A.any()):
            return factor_means(held)  # no mixture is nearer to zero than another
        BB = torch.einsum("kor,los->klrs", B, B)
        AA = torch.einsum("kri,lsi->klrs", A, A)
        a, b = p, p
        for _ in range(self.sweeps):
            a = _fitted(BB, AA, p, b)
            b = _fitted(AA, BB, p, a)
        return Factors(torch.tensordot(b, B, 1), torch.tensordot(a, A, 1))


def _fitted(fixed: Tensor, free: Tensor, p: Tensor, mixture: Tensor) -> Tensor:
    """The free mixture that is best beside the fixed one, from the products of both."""
    both = torch.einsum("k,l,klrs->rs", mixture, mixture, fixed)
    gram = torch.einsum("rs,klrs->kl", both, free)
    with_all = torch.einsum("l,klrs->krs", mixture, fixed)
    target = torch.einsum("k,krs,klrs->l", p, with_all, free)
    found: Tensor = torch.linalg.lstsq(gram, target[:, None], driver="gelsd").solution
    return found[:, 0]
