"""Small clients for the training loop, and how near two trained adapters are."""

from collections.abc import Callable

import numpy as np
import torch

from flexlora.data import TokenStore
from flexlora.laws.dense import product, relative_error
from flexlora.lowrank.factors import Adapter, Factors
from flexlora.model.base import Base
from flexlora.model.blocks import kind
from flexlora.training.loop import ClientTask, Trained, train_together
from flexlora.training.optimizer import Training
from support.factors import random_adapter, random_factors

SGD = {"optimizer": "sgd", "learning_rate": 0.5, "momentum": 0.5}
SLOW = {**SGD, "learning_rate": 0.1}
"""The first multiplies adapters, and what is rounded differently; the second doubles them."""


def adapter_of(base: Base, ranks: dict[str, int]) -> Adapter:
    """Random factors, small enough that the model stays itself."""
    modules = {}
    for seed, (module, (out, in_)) in enumerate(base.shapes.items()):
        f = random_factors(out, ranks[kind(module)], in_, seed, torch.float32)
        modules[module] = Factors(0.05 * f.B, f.A / in_**0.5)
    return Adapter(modules)


def of_rank(base: Base, rank: int, seed: int = 0) -> Adapter:
    return random_adapter(base.shapes, rank, seed)


def settings(**changes) -> Training:
    plain = {"learning_rate": 0.01, "batch_examples": 4, "pack_tokens": 12, "alpha": 6.0}
    return Training(**{**plain, **changes})


def draw(seed: int = 9) -> np.random.Generator:
    return np.random.default_rng(seed)


def distance(got: Adapter, want: Adapter) -> float:
    """The largest relative error of a module's product."""
    return max(relative_error(product(got[m]), product(want[m])) for m in want)


def distance_from(start: Adapter) -> Callable[[Adapter, Adapter], float]:
    """The same, relative to what training has changed."""

    def moved(got: Adapter, want: Adapter) -> float:
        begun = {m: product(start[m]) for m in want}
        return max(
            relative_error(product(got[m]) - begun[m], product(want[m]) - begun[m]) for m in want
        )

    return moved


def assert_close(got: Adapter, want: Adapter, tolerance: float) -> None:
    for module in want:
        assert relative_error(product(got[module]), product(want[module])) < tolerance, module


def assert_moved(got: Adapter, start: Adapter) -> None:
    for module in start:
        assert relative_error(product(got[module]), product(start[module])) > 1e-3, module


def train(
    base: Base, task: ClientTask, store: TokenStore, settings: Training, round: int = 1
) -> Trained:
    """Train a single client."""
    return train_together(base, [task], store, settings, round)[0]
