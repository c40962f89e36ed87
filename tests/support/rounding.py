"""Tolerances that follow from the precision: how far one rounding of every weight moves a result.

A float32 sum depends on the order of its terms, and that order on the processor: AVX2 kernels
add eight partial sums, AVX-512 kernels sixteen. Each result is the exact one of slightly
different inputs. How much that is in the end depends on the computation: steep losses and
several optimiser steps multiply it. So it is measured, by the computation with other inputs.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn

T = TypeVar("T")

ROUNDINGS = 4
"""Every weight is in a product of the forward and of the backward pass, in both computations."""

DRAWS = 3

MOST = 1e-3
"""A result that rounding moves further than this says nothing about a wrong term."""


@contextmanager
def nudged(model: nn.Module, seed: int) -> Iterator[None]:
    """Every weight larger or smaller by one unit in its last place, by chance."""
    weights = [each.data for each in model.parameters() if each.is_floating_point()]
    before = [each.clone() for each in weights]
    draw = torch.Generator().manual_seed(seed)
    for each in weights:
        signs = torch.randint(0, 2, each.shape, generator=draw).mul_(2).sub_(1)
        each.mul_(1 + torch.finfo(each.dtype).eps * signs.to(each))
    try:
        yield
    finally:
        for each, value in zip(weights, before, strict=True):
            each.copy_(value)


def rounding(
    model: nn.Module,
    compute: Callable[[], T],
    want: T,
    distance: Callable[[T, T], float],
) -> float:
    """How far rounding may move ``want``, the result of ``compute``: ``distance(got, want)``."""
    moved = []
    for seed in range(DRAWS):
        with nudged(model, seed):
            moved.append(distance(compute(), want))
    tolerance = ROUNDINGS * max(moved)
    assert 0 < tolerance < MOST, f"rounding alone may move the result by {tolerance:.1e}"
    return tolerance
