"""Training the parameters of which the factors are a function, instead of the factors.

A method may train cores between frozen bases, the cores of a tensor train, or single entries of
a matrix. The model's layers still take ``B`` and ``A``. Before each optimiser step the factors'
gradients are pulled back to the parameters, and after it the factors are recomputed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from flexlora.lowrank import Adapter, Factors, Parametrization, as_vector
from flexlora.model import FlatAdapter, leaf


@dataclass(frozen=True, eq=False)
class ReparametrizedAdapter:
    """Trainable parameters by module, as views of ``values`` (n,), and the factors they define.

    It has the interface of ``FlatAdapter`` for the training loop; ``leaves`` are the factors
    that the model's layers take, at a scale of 1. Memory: parameters and gradients, each
    factor, and the gradient of each factor that depends on parameters.
    """

    values: Tensor
    forms: Mapping[str, Parametrization]
    leaves: FlatAdapter

    @classmethod
    def of(
        cls,
        forms: Mapping[str, Parametrization],
        device: torch.device,
        rest: Mapping[str, Factors] | None = None,
    ) -> ReparametrizedAdapter:
        """A float32 copy of the parameters on ``device``, with gradients of zero."""
        values = torch.empty(sum(f.parameters.numel() for f in forms.values()), device=device)
        grads, start = torch.zeros_like(values), 0
        device_forms, factors = {}, {}
        for module, form in forms.items():
            parameters, start = leaf(values, grads, start, form.parameters.shape)
            with torch.no_grad():
                parameters.copy_(form.parameters)
            frozen = tuple(x.to(device) for x in form.frozen)
            device_forms[module] = Parametrization(parameters, form.make, frozen)
            computed = device_forms[module].factors()
            factors[module] = Factors(_detached(computed.B), _detached(computed.A))
        values.requires_grad_().grad = grads
        frozen_factors = {m: f.to(device).to(torch.float32) for m, f in (rest or {}).items()}
        leaves = FlatAdapter(values, factors, dict.fromkeys(factors, 1.0), frozen_factors)
        return cls(values, device_forms, leaves)

    def folded(self) -> dict[str, Factors]:
        """The effective factors; ``pull_back_gradients`` passes their gradients on."""
        return self.leaves.folded()

    def pull_back_gradients(self) -> None:
        """Add the factors' gradients, pulled back, to the parameters'; once before each step.

        Costs one evaluation of each parametrization and of its derivative.
        """
        for module, form in self.forms.items():
            computed, leaves = form.factors(), self.leaves.factors[module]
            pairs = [
                (value, each.grad)
                for value, each in ((computed.B, leaves.B), (computed.A, leaves.A))
                if value.requires_grad
            ]
            torch.autograd.backward([p[0] for p in pairs], [p[1] for p in pairs])

    def update_factors(self) -> None:
        """Recompute the factors, in place, from the parameters after a step."""
        with torch.no_grad():
            for module, form in self.forms.items():
                computed, leaves = form.factors(), self.leaves.factors[module]
                for value, each in ((computed.B, leaves.B), (computed.A, leaves.A)):
                    if each.requires_grad:
                        each.copy_(value)

    def zero_grad(self) -> None:
        """Set all gradients to zero, in place: the parameters' and the factors'."""
        assert self.values.grad is not None
        self.values.grad.zero_()
        for f in self.leaves.factors.values():
            for each in (f.B, f.A):
                if each.grad is not None:
                    each.grad.zero_()

    def finish(self) -> Adapter:
        """Each module's parameters by ``as_vector``, on the CPU; frees the gradients."""
        for f in self.leaves.factors.values():
            f.B.grad = f.A.grad = None
        for form in self.forms.values():
            form.parameters.grad = None
        self.values.grad = None
        return Adapter(
            {m: as_vector(f.parameters.detach().clone().cpu()) for m, f in self.forms.items()}
        )


def _detached(value: Tensor) -> Tensor:
    """The value itself if it has no gradient, else a leaf copy of it with a gradient of zero."""
    if not value.requires_grad:
        return value
    copy = value.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
    copy.grad = torch.zeros_like(copy)
    return copy
