"""Factors that are functions of other parameters, which a client trains in their stead.

A method may train cores between frozen bases, the cores of a tensor train, or single entries of
a matrix. The model's layers take ``B`` and ``A`` as ever. Their gradients are pulled back to the
parameters once in a step, and after it the factors are computed anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from flexlora.lowrank import Adapter, Factors, Parametrization, as_vector
from flexlora.model import FlatAdapter, leaf


@dataclass(frozen=True, eq=False)
class FormedAdapter:
    """Trainable parameters by module, all lying in ``values``, and the factors they make.

    To the training loop it is what ``FlatAdapter`` is; ``leaves`` are the factors that the
    model's layers take, at a scale of one. Beside parameters and gradients it holds each
    factor once, and once more the gradient of one that depends on parameters.
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
    ) -> FormedAdapter:
        """A float32 copy of the parameters on ``device``, with gradients of zero."""
        values = torch.empty(sum(f.parameters.numel() for f in forms.values()), device=device)
        grads, start = torch.zeros_like(values), 0
        here, factors = {}, {}
        for module, form in forms.items():
            own, start = leaf(values, grads, start, form.parameters.shape)
            with torch.no_grad():
                own.copy_(form.parameters)
            here[module] = Parametrization(own, form.make, tuple(x.to(device) for x in form.frozen))
            made = here[module].factors()
            factors[module] = Factors(_cut(made.B), _cut(made.A))
        values.requires_grad_().grad = grads
        beside = {m: f.to(device).to(torch.float32) for m, f in (rest or {}).items()}
        return cls(values, here, FlatAdapter(values, factors, dict.fromkeys(factors, 1.0), beside))

    def folded(self) -> dict[str, Factors]:
        """The effective factors; a gradient of theirs reaches the parameters by ``gather``."""
        return self.leaves.folded()

    def gather(self) -> None:
        """Pull the factors' gradients back to the parameters; once in a step, before it.

        Costs one evaluation of each form and of its derivative.
        """
        for module, form in self.forms.items():
            made, held = form.factors(), self.leaves.factors[module]
            pairs = [
                (value, each.grad)
                for value, each in ((made.B, held.B), (made.A, held.A))
                if value.requires_grad
            ]
            torch.autograd.backward([p[0] for p in pairs], [p[1] for p in pairs])

    def spread(self) -> None:
        """Compute the factors anew, in place, from the parameters as they are after a step."""
        with torch.no_grad():
            for module, form in self.forms.items():
                made, held = form.factors(), self.leaves.factors[module]
                for value, each in ((made.B, held.B), (made.A, held.A)):
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
        """Each module's parameters as a ``as_vector``, on the CPU; the gradients are given up."""
        for f in self.leaves.factors.values():
            f.B.grad = f.A.grad = None
        for form in self.forms.values():
            form.parameters.grad = None
        self.values.grad = None
        return Adapter(
            {m: as_vector(f.parameters.detach().clone().cpu()) for m, f in self.forms.items()}
        )


def _cut(value: Tensor) -> Tensor:
    """A leaf of this value, with a gradient of zero if it depends on parameters."""
    if not value.requires_grad:
        return value
    own = value.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
    own.grad = torch.zeros_like(own)
    return own
