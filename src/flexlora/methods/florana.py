"""FLoRA-NA (arXiv 2509.26399): mixed factors, with the mixture fitted to the mean of products.

``A = sum_u a_u A_u`` and ``B = sum_u b_u B_u`` with the ``a`` and ``b`` that bring ``B A``
nearest to ``W = sum_k p_k B_k A_k``: two least-squares problems in K unknowns in turn, starting
from the clients' shares. All that they need are the r x r products of factors, never ``W``.

From the abstract (unverified: that the factors are linear combinations). Differs: the
solver is ours.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flexlora.errors import ConfigError
from flexlora.lowrank import Adapter, Factors, normalized
from flexlora.method import Cohort, Feature, Info, Mean, Method, RoundContext, State, Weights


@dataclass(frozen=True)
class FLoRANA(Method):
    """FLoRA-NA. ``sweeps`` is how often both mixtures are fitted.

    Unequal ranks are refused at start-up.
    """

    info = Info(
        "FLoRA-NA: nearest mixtures of the factors",
        "arXiv 2509.26399",
        up="r*(m+n)",
        down="r*(m+n)",
        server="K^2 products of factors, systems of K unknowns",
    )
    features = frozenset({Feature.PER_MODULE, Feature.SAME_FOR_EQUAL_RANKS})
    needs = frozenset({Mean.FACTORS, Mean.UPLOADS})

    sweeps: int = 10
    weights: Weights = "examples"

    def __post_init__(self) -> None:
        if self.sweeps < 1:
            raise ConfigError(f"sweeps is at least 1, got {self.sweeps}.")

    def aggregate(self, state: State, cohort: Cohort, context: RoundContext) -> State:
        """K^2 products of factors of each module, and 2 ``sweeps`` systems of K unknowns."""
        model = {}
        for module, last in state.model.items():
            model[module] = self._mixed(cohort, module).to(last.B.dtype)
        return replace(state, model=Adapter(model))

    def _mixed(self, cohort: Cohort, module: str) -> Factors:
        p = torch.tensor(normalized(list(cohort.weights.values())), dtype=torch.float64)
        factors = [upload.adapter[module] for upload in cohort.uploads]
        B = torch.stack([f.B.double() for f in factors])
        A = torch.stack([f.A.double() for f in factors])
        if not (B.any() and A.any()):
            return cohort.factors(module)  # no mixture is nearer to zero than another
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
    solution: Tensor = torch.linalg.lstsq(gram, target[:, None], driver="gelsd").solution
    return solution[:, 0]
