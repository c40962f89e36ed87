"""An adapter's factors as parameters in one flat tensor, so that a step is one kernel call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor

from flexlora.lowrank import Adapter, FactorNames, Factors

Scale = Callable[[int], float]
"""The LoRA scale as a function of a module's rank."""


@dataclass(frozen=True, eq=False)
class FlatAdapter:
    """Trainable factors by module, as views of ``values`` (n,), with gradients in its ``grad``.

    A factor that is not trained is a tensor of its own without a gradient. ``rest`` are frozen
    factors by module, which are added in every pass and not trained.

    Optimisers and clipping work on ``values``, which is equivalent to working on every factor
    and takes one call instead of hundreds; it also keeps long-lived buffers from being
    allocated between activations. The LoRA scale is divided out of ``B``: a client optimises
    ``B / scale(rank)``, as PEFT's LoRA does. ``finish`` folds it in again.
    """

    values: Tensor
    factors: Mapping[str, Factors]
    scales: Mapping[str, float]
    rest: Mapping[str, Factors] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        adapter: Adapter,
        scale: Scale,
        device: torch.device,
        halves: FactorNames = "BA",
        rest: Mapping[str, Factors] | None = None,
        ranks: Mapping[str, int] | None = None,
    ) -> FlatAdapter:
        """A float32 copy of ``adapter`` on ``device``, with gradients of zero.

        ``halves`` are the factors to train. ``ranks`` are the ranks from which the scale is
        computed, for modules where it is not the adapter's own rank.
        """
        scales = {m: scale((ranks or {}).get(m, f.rank)) for m, f in adapter.items()}
        size = sum(
            (f.B.numel() if "B" in halves else 0) + (f.A.numel() if "A" in halves else 0)
            for f in adapter.values()
        )
        values = torch.empty(size, device=device)
        grads = torch.zeros_like(values)
        factors, start = {}, 0
        for module, f in adapter.items():
            B = torch.empty(f.B.shape, device=device)
            A = torch.empty(f.A.shape, device=device)
            if "B" in halves:
                B, start = leaf(values, grads, start, f.B.shape)
            if "A" in halves:
                A, start = leaf(values, grads, start, f.A.shape)
            with torch.no_grad():
                B.copy_(f.B).div_(scales[module])
                A.copy_(f.A)
            factors[module] = Factors(B, A)
        values.requires_grad_().grad = grads
        frozen = {m: f.to(device).to(torch.float32) for m, f in (rest or {}).items()}
        return cls(values, factors, scales, frozen)

    @property
    def leaves(self) -> FlatAdapter:
        """The factors that the model's layers take: the parameters themselves."""
        return self

    def folded(self) -> dict[str, Factors]:
        """The effective factors, differentiable in the parameters."""
        return {m: Factors(f.B * self.scales[m], f.A) for m, f in self.factors.items()}

    def pull_back_gradients(self) -> None:
        """No operation: the factors' gradients are the parameters' gradients."""

    def update_factors(self) -> None:
        """No operation: the factors are the parameters."""

    def finish(self) -> Adapter:
        """A copy of the adapter on the CPU, with the scale folded in; frees the gradients."""
        for f in self.factors.values():
            f.B.grad = f.A.grad = None
        self.values.grad = None
        with torch.no_grad():
            return Adapter(
                {
                    m: Factors(f.B.cpu(), f.A.detach().clone().cpu())
                    for m, f in self.folded().items()
                }
            )

    def zero_grad(self) -> None:
        """Set all gradients to zero, in place: the factors' gradients are views of them."""
        assert self.values.grad is not None
        self.values.grad.zero_()


def leaf(values: Tensor, grads: Tensor, start: int, shape: torch.Size) -> tuple[Tensor, int]:
    """A leaf of this shape in ``values`` from ``start``, with its gradient in ``grads``.

    Returns the leaf and the index after it.
    """
    end = start + prod(shape)
    # Detached: as a view of ``values`` its gradient would be one of the size of ``values``.
    leaf = values[start:end].view(shape).detach().requires_grad_()
    leaf.grad = grads[start:end].view(shape)
    return leaf, end
