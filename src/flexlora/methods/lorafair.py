"""LoRA-FAIR (arXiv 2411.14961): averaged factors, ``B`` corrected towards the true mean.

With ``W = sum_k p_k B_k A_k`` and the averages ``B``, ``A`` the server looks for the ``D`` with
``(B + D) A`` near ``W`` and ``D`` small, and hands out ``A`` and ``B + D``.

``solver`` "cosine" is the paper's: gradient descent on ``1 - cos(W, (B + D) A) + strength |D|``.
Differs: the default, "ridge", minimises ``|W - (B + D) A|^2 + strength |D|^2``, which has the
closed form ``D = (W - B A) A' (A A' + strength I)^-1`` and does not ignore the scale; there
``strength`` is relative to the mean squared row of ``A``.

From reading notes, not from the paper's text (unverified: step size and number of steps).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from flexlora.errors import ConfigError
from flexlora.lowrank import Adapter, Factors, LowRankSum
from flexlora.method import Cohort, Feature, Info, Mean, Method, RoundContext, State, Weights


@dataclass(frozen=True)
class LoRAFAIR(Method):
    """LoRA-FAIR. Unequal ranks are refused at start-up."""

    info = Info(
        "LoRA-FAIR: averaged factors, B corrected on the server",
        "arXiv 2411.14961",
        up="r*(m+n)",
        down="r*(m+n)",
        server="products of factors, one system of r unknowns",
    )
    features = frozenset({Feature.PER_MODULE, Feature.SAME_FOR_EQUAL_RANKS})
    needs = frozenset({Mean.FACTORS, Mean.PRODUCTS})

    solver: Literal["ridge", "cosine"] = "ridge"
    strength: float = 0.01
    steps: int = 100
    step_size: float = 0.01
    weights: Weights = "examples"

    def __post_init__(self) -> None:
        for name in ("strength", "step_size"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} is finite and above 0, got {getattr(self, name)}.")
        if self.steps < 1:
            raise ConfigError(f"steps is at least 1, got {self.steps}.")

    def aggregate(self, state: State, cohort: Cohort, context: RoundContext) -> State:
        """Averaged factors, ``B`` corrected; products of factors, never the full matrix."""
        solve, model = self._ridge if self.solver == "ridge" else self._cosine, {}
        for module, last in state.model.items():
            products, mean = cohort.products(module), cohort.factors(module)
            corrected = Factors(mean.B + solve(products, mean), mean.A)
            model[module] = corrected.to(last.B.dtype)
        return replace(state, model=Adapter(model))

    def _ridge(self, products: LowRankSum, mean: Factors) -> Tensor:
        gram = mean.A @ mean.A.T
        if not gram.any():
            return torch.zeros_like(mean.B)
        missed = _times(products, mean.A) - mean.B @ gram
        eye = torch.eye(len(gram), dtype=gram.dtype)
        damped = gram + self.strength * gram.diagonal().mean() * eye
        D: Tensor = torch.linalg.solve(damped, missed, left=False)
        return D

    def _cosine(self, products: LowRankSum, mean: Factors) -> Tensor:
        through, gram = _times(products, mean.A), mean.A @ mean.A.T
        norm = products.norm()
        D = torch.zeros_like(mean.B)
        if norm == 0 or not (mean.B @ gram).any():
            return D  # no direction to turn from or to
        for _ in range(self.steps):
            D.requires_grad_()
            B = mean.B + D
            size = ((B @ gram) * B).sum().clamp_min(1e-300).sqrt()
            loss = 1 - (through * B).sum() / (norm * size) + self.strength * D.norm()
            (slope,) = torch.autograd.grad(loss, D)
            D = D.detach() - self.step_size * slope
        return D


def _times(products: LowRankSum, A: Tensor) -> Tensor:
    """The weighted sum of products, times ``A'``."""
    terms = [weight * f.B.double() @ (f.A.double() @ A.T) for weight, f in products.terms]
    return torch.stack(terms).sum(0)
