"""The tiny model, loaded once."""

import numpy as np
import pytest
import torch

from flexlora.lowrank.factors import Adapter


@pytest.fixture
def adapter(base, factors) -> Adapter:
    """A random update of every layer, large enough to change what the model writes."""
    return Adapter(
        {
            module: factors(out, 3, in_, seed, torch.float32)
            for seed, (module, (out, in_)) in enumerate(base.shapes.items())
        }
    )


@pytest.fixture
def prompts_of_words() -> list[np.ndarray]:
    """Prompts of several lengths, none like another."""
    draw = np.random.default_rng(6)
    return [draw.integers(3, 15, size=size).astype(np.int32) for size in (5, 2, 13, 7)]
