"""The settings of local training: the optimiser, its learning rates and the LoRA scale."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from flexlora.errors import ConfigError
from flexlora.model import Scale


@dataclass(frozen=True)
class Training:
    """The settings of one client's local training.

    ``batch_examples`` is the effective batch size of an optimiser step. ``pack_tokens`` bounds
    the tokens in memory at once and affects nothing else. A pack of more than
    ``recompute_above`` tokens uses gradient checkpointing: activations of only one layer are in
    memory, for about a third more time. The schedule covers one client's local training;
    ``round_decay`` multiplies the learning rate from round to round. ``alpha`` is LoRA's: the
    scale is alpha / rank (``scaling = "rank"``), alpha / sqrt(rank) (``"sqrt"``, rsLoRA) or
    alpha itself (``"none"``).

    Raises:
        ConfigError: a number is out of range.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = 5e-4
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup_steps: int = 0
    round_decay: float = 1.0
    weight_decay: float = 0.0
    momentum: float = 0.0
    clip_norm: float = 1.0
    epochs: int = 1
    max_steps: int | None = None
    batch_examples: int = 16
    pack_tokens: int = 2048
    prompt_loss: bool = False
    alpha: float = 16.0
    scaling: Literal["rank", "sqrt", "none"] = "rank"
    recompute_above: int | None = None

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_examples", "pack_tokens", "max_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"training.{name} is {value}; give at least 1.")
        for name in ("learning_rate", "round_decay", "clip_norm", "alpha"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise ConfigError(f"training.{name} is {value}; give a finite number above 0.")
        for name in ("weight_decay", "momentum", "warmup_steps", "recompute_above"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ConfigError(f"training.{name} is {value}; give 0 or more.")

    @property
    def scale(self) -> Scale:
        """The LoRA scale as a function of a module's rank."""
        powers = {"rank": 1.0, "sqrt": 0.5, "none": 0.0}
        power, alpha = powers[self.scaling], self.alpha
        return lambda rank: float(alpha / max(rank, 1) ** power)

    def steps(self, examples: int) -> int:
        """The optimizer steps of one client's local training on so many examples."""
        planned = self.epochs * -(-examples // self.batch_examples)
        return planned if self.max_steps is None else min(planned, self.max_steps)

    def rate(self, step: int, steps: int, round: int) -> float:
        """The learning rate of a step (from 0) of ``steps`` in a round (from 1)."""
        peak = self.learning_rate * self.round_decay ** (round - 1)
        if step < self.warmup_steps:
            return peak * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(steps - self.warmup_steps, 1)
        if self.schedule == "linear":
            return peak * (1 - progress)
        if self.schedule == "cosine":
            return peak * 0.5 * (1 + math.cos(math.pi * progress))
        return peak

    def make(self, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
        """A new optimiser; its moments do not carry over from round to round."""
        if self.optimizer == "adamw":
            return torch.optim.AdamW(
                parameters, lr=self.learning_rate, weight_decay=self.weight_decay, fused=True
            )
        return torch.optim.SGD(
            parameters,
            lr=self.learning_rate,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            fused=True,
        )
