"""Random factors whose sizes all differ."""

import numpy as np
import torch

from flexlora.adapter import Factors


def random_factors(out=11, rank=3, in_=7, seed=0, dtype=torch.float64) -> Factors:
    draw = np.random.default_rng(seed)
    return Factors(
        torch.tensor(draw.normal(size=(out, rank)), dtype=dtype),
        torch.tensor(draw.normal(size=(rank, in_)), dtype=dtype),
    )
