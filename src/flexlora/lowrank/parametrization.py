"""Factors as a differentiable function of other parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from flexlora.errors import AdapterError
from flexlora.lowrank.factors import Factors


@dataclass(frozen=True, eq=False)
class Parametrization:
    """One module's factors as a differentiable function of flat ``parameters``.

    ``make(parameters, *frozen)`` gives the factors, of which one may be without a gradient;
    ``frozen`` are the tensors that it needs besides. The LoRA scale has no part in it: the
    parameters are those of the effective update.

    Raises:
        AdapterError: the parameters are not flat, or there are none.
    """

    parameters: Tensor
    make: Callable[..., Factors]
    frozen: tuple[Tensor, ...] = ()

    def __post_init__(self) -> None:
        if self.parameters.ndim != 1 or self.parameters.numel() == 0:
            raise AdapterError(
                f"The parameters are of shape {tuple(self.parameters.shape)}; give one flat tensor "
                "with at least one number."
            )

    def factors(self, parameters: Tensor | None = None) -> Factors:
        """The factors of these parameters, by default of its own, in their precision."""
        parameters = self.parameters if parameters is None else parameters
        return self.make(
            parameters,
            *(x.to(parameters.dtype) if x.is_floating_point() else x for x in self.frozen),
        )


def as_vector(parameters: Tensor) -> Factors:
    """Flat parameters as they travel: ``B`` is (n, 1).

    ``A`` is (1, 0): it has a component and no parameters.
    """
    return Factors(parameters[:, None], parameters.new_zeros(1, 0))
