"""What a law looks at: a method with a past among three clients; and how it is broken."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from flexlora.laws import rounds
from flexlora.laws.dense import product, relative_error
from flexlora.laws.rounds import ClientTurn, Learn
from flexlora.lowrank import Adapter, Factors
from flexlora.method import Client, Feature, Method, RoundContext, State, Upload

ROUNDING = 1e-9
"""The relative error allowed in float64: of an SVD the null space costs some digits."""


class Violation(AssertionError):
    """A method breaks a law; the text says how."""


@dataclass(frozen=True)
class Case:
    """A method among three clients, with a past of two rounds and the uploads of the third.

    ``folder`` is empty and may be written to.
    """

    method: Method
    folder: Path

    @cached_property
    def clients(self) -> list[Client]:
        """Three clients, of mixed ranks where the method supports them."""
        return rounds.clients_of(self.method)

    @cached_property
    def state(self) -> State:
        """The state after two rounds in which every client learnt something."""
        return rounds.after_rounds(self.method, self.clients, 2, self.noise)

    @cached_property
    def context(self) -> RoundContext:
        """That of the third round."""
        return rounds.context_of(3, self.clients)

    @cached_property
    def turns(self) -> list[ClientTurn]:
        """The third round of every client."""
        return [
            rounds.client_turn(self.method, self.state, client, self.context, self.noise(3))
            for client in self.clients
        ]

    @property
    def uploads(self) -> list[Upload]:
        """The uploads of the third round."""
        return [turn.upload for turn in self.turns]

    @property
    def has_parameters_of_its_own(self) -> bool:
        """Whether clients train other parameters than the factors in the third round."""
        return self.method.parametrize(self.turns[0].start) is not None

    def noise(self, number: int) -> Learn:
        """Training as noise, other noise in every round."""
        return rounds.noise(self.method, number)

    def update(self, uploads: Sequence[Upload]) -> Adapter:
        """The update after aggregation; of personal models what is shared, as an update."""
        after = rounds.aggregated(self.method, self.state, uploads, self.context)
        if Feature.PERSONAL not in self.method.features:
            return self.method.global_adapter(after, self.context)
        return Adapter({m: _with_ones(f) for m, f in after.model.items()})


def _with_ones(f: Factors) -> Factors:
    return Factors(torch.ones(f.shape[0], f.rank, dtype=f.A.dtype), f.A)


def require(holds: bool, sentence: str) -> None:
    """Raise a ``Violation`` with this sentence, unless the condition holds."""
    if not holds:
        raise Violation(sentence)


def require_same(
    value: Mapping[str, Factors], expected: Mapping[str, Factors], tolerance: float = ROUNDING
) -> None:
    """Raise a ``Violation`` where the products of a module differ by more than the tolerance."""
    for module in expected:
        error = relative_error(product(value[module]), product(expected[module]))
        require(error < tolerance, f"{module}: the products differ by {error:.3g}")


def is_equal(one: Factors, other: Factors) -> bool:
    """Whether two factor pairs are the same to the bit."""
    return torch.equal(one.B, other.B) and torch.equal(one.A, other.A)
