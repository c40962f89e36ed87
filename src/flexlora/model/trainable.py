"""An adapter's factors as parameters in one flat tensor, so that a step is one kernel."""

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
    """Trainable factors by module, all lying in ``values``, their gradients in ``values.grad``.

    A half that is not trained lies elsewhere and has no gradient; ``rest`` are factors that
    take part in every pass, and in none of the training.

    Optimisers and clipping work on ``values`` alone, which is the same as working on every
    factor and takes one call instead of hundreds; and long-lived buffers do not come to lie
    between activations. The scale is taken out of ``B``: a client optimises
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

        ``ranks`` are those that the scale is of, where they are not the adapter's own.
        """
        scales = {m: scale((ranks or {}).get(m, f.rank)) for m, f in adapter.items()}
        trained = sum(
            (f.B.numel() if "B" in halves else 0) + (f.A.numel() if "A" in halves else 0)
            for f in adapter.values()
        )
        values = torch.empty(trained, device=device)
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
        beside = {m: f.to(device).to(torch.float32) for m, f in (rest or {}).items()}
        return cls(values, factors, scales, beside)

    @property
    def leaves(self) -> FlatAdapter:
        """What the model's layers take: the parameters themselves."""
        return self

    def folded(self) -> dict[str, Factors]:
        """The effective factors, differentiable in the parameters."""
        return {m: Factors(f.B * self.scales[m], f.A) for m, f in self.factors.items()}

    def gather(self) -> None:
        """Nothing: the factors are the parameters, and so are their gradients."""

    def spread(self) -> None:
        """Nothing: the factors are the parameters."""

    def finish(self) -> Adapter:
        """The adapter that the parameters are now, on the CPU; the gradients are given up."""
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
        """Set all gradients to zero, in place: the factors' gradients lie there too."""
        assert self.values.grad is not None
        self.values.grad.zero_()


def leaf(values: Tensor, grads: Tensor, start: int, shape: torch.Size) -> tuple[Tensor, int]:
    """A leaf of this shape within ``values``, with its gradient within ``grads``."""
    end = start + prod(shape)
    # Detached: as a view of ``values`` its gradient would be one of the size of ``values``.
    leaf = values[start:end].view(shape).detach().requires_grad_()
    leaf.grad = grads[start:end].view(shape)
    return leaf, end
