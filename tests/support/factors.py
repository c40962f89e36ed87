"""Random factors whose sizes all differ."""

import numpy as np
import torch

from flexlora.lowrank.factors import Adapter, Factors


def random_factors(out=11, rank=3, in_=7, seed=0, dtype=torch.float64) -> Factors:
    draw = np.random.default_rng(seed)
    return Factors(
        torch.tensor(draw.normal(size=(out, rank)), dtype=dtype),
        torch.tensor(draw.normal(size=(rank, in_)), dtype=dtype),
    )


def random_adapter(shapes, rank, seed=0, dtype=torch.float32) -> Adapter:
    """An adapter for modules of these shapes, small enough that a model stays itself."""
    modules = {}
    for number, (module, (out, in_)) in enumerate(shapes.items(), seed):
        f = random_factors(out, rank, in_, number, dtype)
        modules[module] = Factors(0.05 * f.B, f.A / in_**0.5)
    return Adapter(modules)
