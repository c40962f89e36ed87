"""FedProx (arXiv 1812.06127): clients pay for the distance from where they started.

The loss gains ``strength / 2 * ||B A - B0 A0||_F^2``, summed over the modules, the distance of
the effective updates. So it does not matter how a product is split into factors, and clients
of any ranks pay by the same measure.

With ``dB = B - B0`` and ``dA = A - A0`` the difference of products is ``dB A + B0 dA``, and

``||dB A + B0 dA||^2 = <dB'dB, AA'> + 2 <dB'B0, A dA'> + <B0'B0, dA dA'>``,

inner products of r x r matrices: nothing of the size out x in is formed, and near the start,
where the products are almost equal, no digits are lost.

Differs: the paper measures the distance of the parameters, here of the weights that they make.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from flexlora.errors import ConfigError
from flexlora.lowrank import Factors
from flexlora.method.interface import Download, Method
from flexlora.method.regularizer import Regularizer
from flexlora.method.wrapper import MethodWrapper
from flexlora.training import Training


@dataclass(frozen=True)
class FedProx(Regularizer):
    """FedProx. ``strength`` is the paper's mu. It composes with every method."""

    title = "FedProx: near the start"
    paper = "arXiv 1812.06127"

    strength: float = 0.01

    def __post_init__(self) -> None:
        if not 0 <= self.strength < math.inf:
            raise ConfigError(f"strength is finite and not negative, got {self.strength}.")

    def wrap(self, method: Method, training: Training) -> Method:
        """The method with the distance added to its own penalty."""
        return WithFedProx(method, self.strength)


@dataclass(frozen=True)
class WithFedProx(MethodWrapper):
    """A method whose clients pay for the distance from where they started."""

    inner: Method
    strength: float

    @property
    def wrapped(self) -> Method:
        """The method inside."""
        return self.inner

    @property
    def label(self) -> str:
        """FedProx and its strength."""
        return f"FedProx {self.strength}"

    def penalty(self, current: Mapping[str, Factors], start: Download) -> Tensor | None:
        """The method's own penalty and the distance; O(r^2 (out + in)) a module and step.

        Reads the start once, from the disk if the download lies there.
        """
        own, parametrizations = self.inner.penalty(current, start), self.inner.parametrize(start)
        terms = [] if own is None else [own]
        for module, f in current.items():
            before = start.adapter[module]
            if parametrizations is not None:
                before = parametrizations[module].factors()
            terms.append(self.strength / 2 * squared_distance(f, before.to(f.B.device)))
        return torch.stack(terms).sum()


def squared_distance(current: Factors, start: Factors) -> Tensor:
    """``||B A - B0 A0||_F^2`` for factors of one rank, differentiable in the first.

    Rounding is that of ``current``; the value may be below zero by it.
    """
    B0, A0 = start.B.detach().to(current.B.dtype), start.A.detach().to(current.A.dtype)
    dB, dA = current.B - B0, current.A - A0
    return (
        ((dB.T @ dB) * (current.A @ current.A.T)).sum()
        + 2 * ((dB.T @ B0) * (current.A @ dA.T)).sum()
        + ((B0.T @ B0) * (dA @ dA.T)).sum()
    )
