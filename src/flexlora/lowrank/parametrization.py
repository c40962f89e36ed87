"""Factors as a differentiable function of other parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from flexlora.errors import AdapterError
from flexlora.lowrank.factors import Factors


@dataclass(frozen=True, eq=False)
class Parametrization:
    """One module's factors as a differentiable function of flat ``parameters`` (n,).

    ``make(parameters, *frozen)`` computes the factors, one of which may have no gradient;
    ``frozen`` are the constant tensors that it needs. The LoRA scale is not applied: the
    parameters are those of the effective update.

    Raises:
        AdapterError: the parameters are not one-dimensional, or there are none.
    """

    parameters: Tensor
    make: Callable[..., Factors]
    frozen: tuple[Tensor, ...] = ()

    def __post_init__(self) -> None:
        if self.parameters.ndim != 1 or self.parameters.numel() == 0:
            raise AdapterError(
                f"The parameters of a parametrization have shape {tuple(self.parameters.shape)}; "
                "give one flat tensor with at least one element."
            )

    def factors(self, parameters: Tensor | None = None) -> Factors:
        """The factors for these parameters, by default its own, in the parameters' dtype."""
        parameters = self.parameters if parameters is None else parameters
        return self.make(
            parameters,
            *(x.to(parameters.dtype) if x.is_floating_point() else x for x in self.frozen),
        )


def as_vector(parameters: Tensor) -> Factors:
    """Flat parameters (n,) in the form in which messages carry them: ``B`` is (n, 1).

    ``A`` is (1, 0), a tensor without elements.
    """
    return Factors(parameters[:, None], parameters.new_zeros(1, 0))
