"""Ingredients for tests: random factors whose sizes all differ."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from flexlora.adapter import Factors

sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(1)


def random_factors(out=11, rank=3, in_=7, seed=0, dtype=torch.float64) -> Factors:
    draw = np.random.default_rng(seed)
    return Factors(
        torch.tensor(draw.normal(size=(out, rank)), dtype=dtype),
        torch.tensor(draw.normal(size=(rank, in_)), dtype=dtype),
    )


@pytest.fixture
def factors():
    return random_factors
