"""The kinds of attack that ``flexlora attack`` simulates."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from flexlora.errors import ConfigError
from flexlora.federation.attacks.attack import Attack, Change, Malicious
from flexlora.lowrank import Factors
from flexlora.seeds import rng

_BELOW_THE_BOUND = 0.95
"""Of the clip bound, which a client can only guess from the size of its own change."""
_CLIP_FACTOR = 3.0
"""The clip factor that an attacker expects where there is none."""


@dataclass(frozen=True)
class SignFlip(Attack):
    """The change turned around, ``strength`` times."""

    text = "the change turned around"
    strength: float = 1.0

    def changes(self, malicious: Sequence[Malicious]) -> list[Change]:
        """Each turns its own."""
        return [each.change.times(-self.strength) for each in malicious]


@dataclass(frozen=True)
class Scale(Attack):
    """The change multiplied by ``strength`` in every round."""

    text = "the change enlarged in every round"
    strength: float = 1000.0

    def changes(self, malicious: Sequence[Malicious]) -> list[Change]:
        """Each enlarges its own."""
        return [each.change.times(self.strength) for each in malicious]


@dataclass(frozen=True)
class ScaleOnce(Attack):
    """The change multiplied by ``strength`` in one round, the second."""

    text = "the change enlarged in the second round alone"
    strength: float = 1000.0

    def is_due(self, round: int, rounds: int) -> bool:
        """In the second round, or the only one."""
        return round == min(2, rounds)

    def changes(self, malicious: Sequence[Malicious]) -> list[Change]:
        """Each enlarges its own."""
        return [each.change.times(self.strength) for each in malicious]


@dataclass(frozen=True)
class Noise(Attack):
    """Random numbers, ``strength`` times as large as the change."""

    text = "random numbers instead of the change"
    strength: float = 100.0

    def changes(self, malicious: Sequence[Malicious]) -> list[Change]:
        """Each draws its own in every round."""
        return [
            _random(each, each.trained.ranks, each.client, each.round).of_norm(
                self.strength * each.change.norm
            )
            for each in malicious
        ]


@dataclass(frozen=True)
class Collusion(Attack):
    """All send one change: their mean turned around, ``strength`` times the median of their norms.

    No client stands out by its size, and they support each other where clients are compared.
    """

    text = "several clients send the same turned change of a usual size"
    least = 2
    strength: float = 1.0

    def changes(self, malicious: Sequence[Malicious]) -> list[Change]:
        """The same for all, as far as their ranks can hold it."""
        own = [each.change for each in malicious]
        size = self.strength * statistics.median(change.norm for change in own)
        together = _sum(own).of_norm(-size)
        return [together] * len(own)


@dataclass(frozen=True)
class Adaptive(Attack):
    """The change turned around, as large as passes unclipped: ``strength`` times the bound."""

    text = "the change turned around, just below the clip bound"
    strength: float = _BELOW_THE_BOUND

    def changes(self, malicious: Sequence[Malicious]) -> list[Change]:
        """Each guesses the median from its own change."""
        return [
            each.change.times(-self.strength * (each.clip_factor or _CLIP_FACTOR))
            for each in malicious
        ]


@dataclass(frozen=True)
class Direction(Attack):
    """A fixed direction of rank 1 in every module, the same in all rounds, just below the bound."""

    text = "a fixed rank-1 direction, just below the clip bound"
    strength: float = _BELOW_THE_BOUND

    def changes(self, malicious: Sequence[Malicious]) -> list[Change]:
        """The same direction for all."""
        return [
            _random(each, dict.fromkeys(each.trained, 1)).of_norm(
                self.strength * (each.clip_factor or _CLIP_FACTOR) * each.change.norm
            )
            for each in malicious
        ]


@dataclass(frozen=True)
class Backdoor(Attack):
    """Trained to answer a trigger with a target, else as usual; the change ``strength`` times."""

    text = "trained to answer a trigger with a target"
    rows = "triggered"
    strength: float = 2.0

    def changes(self, malicious: Sequence[Malicious]) -> list[Change]:
        """Each enlarges its own."""
        return [each.change.times(self.strength) for each in malicious]


@dataclass(frozen=True)
class Poisoning(Attack):
    """Trained on the target as the answer to everything (PEFT-as-an-Attack, arXiv 2411.19335).

    Differs: the paper trains on harmful answers; here they are one harmless text.
    """

    text = "trained on the target as the answer to everything"
    rows = "other answers"
    strength: float = 1.0

    def changes(self, malicious: Sequence[Malicious]) -> list[Change]:
        """Each sends what it has trained."""
        return [each.change.times(self.strength) for each in malicious]


NONE = "none"
"""No attack: all clients are honest."""

KINDS: dict[str, type[Attack]] = {
    "sign-flip": SignFlip,
    "scale": Scale,
    "scale-once": ScaleOnce,
    "noise": Noise,
    "collusion": Collusion,
    "adaptive": Adaptive,
    "direction": Direction,
    "backdoor": Backdoor,
    "poisoning": Poisoning,
}
"""Every kind by its name."""


def named(text: str) -> Attack | None:
    """The attack that ``NAME`` or ``NAME:STRENGTH`` names; None for ``none``.

    Raises:
        ConfigError: there is no such attack, or the strength is no positive number.
    """
    name, colon, strength = text.partition(":")
    if name == NONE and not colon:
        return None
    if name not in KINDS:
        raise ConfigError(
            f"There is no attack {name!r}; there are {NONE}, {', '.join(KINDS)}, each but the "
            "first also with a strength, such as sign-flip:10."
        )
    attack = KINDS[name]()
    if not colon:
        return attack
    try:
        value = float(strength)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e12:
        raise ConfigError(f"The strength of attack {text!r} is a number above 0, below 1e12.")
    return replace(attack, strength=value)  # type: ignore[type-var]


def _random(each: Malicious, ranks: dict[str, int], *address: str | int) -> Change:
    """A random change of these ranks, or of all parameters that travel."""
    modules = {}
    for module, trained in each.trained.items():
        draw, rank = rng(each.seed, "attack", *address, module), ranks[module]
        if each.space == "parameters":
            rank = trained.rank
        B, A = (
            torch.from_numpy(draw.normal(size=size))
            for size in ((trained.B.shape[0], rank), (rank, trained.A.shape[1]))
        )
        modules[module] = Factors(B, A)
    return Change(each.space, modules)


def _sum(changes: Sequence[Change]) -> Change:
    """The sum of several changes; of parameters, components that a client lacks count as zero."""
    space, modules = changes[0].space, {}
    for module in changes[0].modules:
        parts = [change.modules[module] for change in changes if module in change.modules]
        if space == "products":
            modules[module] = Factors(
                torch.cat([f.B for f in parts], 1), torch.cat([f.A for f in parts])
            )
        else:
            rank = max(f.rank for f in parts)
            padded = [f.padded(rank) for f in parts]
            modules[module] = Factors(
                torch.stack([f.B for f in padded]).sum(0), torch.stack([f.A for f in padded]).sum(0)
            )
    return Change(space, modules)
