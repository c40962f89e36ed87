"""Whether what a round has made may become the model: the bounds that uploads must meet."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from flexlora.federation.influence.measure import BESIDE, PRODUCT
from flexlora.lowrank import Adapter, Factors, parameter_change, product_change
from flexlora.method import State, in_parallel
from flexlora.wire.validate import LARGEST_NORM

LARGEST_FACTOR = LARGEST_NORM / 10
"""Of a factor of the model: the next uploads, which start from it, must be within their limit."""

LARGEST_STEP = 10.0
"""How many times the largest change of an upload, or the model itself, a round may change it. A
mean changes no more than the largest of its uploads, and truncations lose no more than there is."""

Largest = Mapping[str, float]
"""The largest norm of an upload's change, by kind."""


def fault(before: State, after: State, largest: Largest, steps_freely: bool) -> str | None:
    """Why a state is not usable, as a sentence; None if it is.

    All that is new in it must be finite, and its factors within ``LARGEST_FACTOR``. The model may
    change by ``LARGEST_STEP`` times what an upload has changed; not where it ``steps_freely``, as
    a server optimizer does, whose steps have a size of their own. Without ``largest``, as where
    uploads are not measured, only the former holds.
    """
    for place, adapter in _new(before, after):
        for module, f in adapter.items():
            sizes = [_length(x) for x in (f.B, f.A)]
            if not all(size <= LARGEST_FACTOR for size in sizes):
                return (
                    f"A factor of module {module!r} of {place} has the norm {max(sizes):.3g}; what "
                    f"clients start from must be at most {LARGEST_FACTOR:g}."
                )
    if steps_freely or not largest:
        return None
    last = _size(before.model)
    limit = LARGEST_STEP * _reach(before, last, largest)
    merged = _merged(before, after)
    # Nearly always enough, and cheaper than the distance.
    if math.hypot(_size(after.model) + last, *merged) <= limit:
        return None
    step = math.hypot(_moved(before, after), *merged)
    if not step <= limit:
        return (
            f"The model would change by {step:.3g}, more than {LARGEST_STEP:g} times what the "
            f"uploads and the model have ({limit:.3g})."
        )
    return None


def _new(before: State, after: State) -> Iterator[tuple[str, Adapter]]:
    """The adapters of a state that the one before did not have, and what they are."""
    if after.model is not before.model:
        yield "the model", after.model
    for name, adapter in after.memory.items():
        if adapter is not before.memory.get(name):
            yield f"the server's {name!r}", adapter
    for round, update in after.merge_log.updates.items():
        if round not in before.merge_log.updates:
            yield "what every client would merge for good", update


def _moved(before: State, after: State) -> float:
    """How far a round has moved the model, in products."""

    def moved(module: str) -> float:
        new, old = after.model[module], before.model.get(module)
        if old is not None and old.shape != new.shape:
            old = None  # it has another form from this round on
        return _distance(new, old)

    return math.hypot(*in_parallel(moved, list(after.model)))


def _merged(before: State, after: State) -> list[float]:
    """How far a round moves every client's base, by module."""
    return [
        _estimate(f, round)
        for round, update in after.merge_log.updates.items()
        if round not in before.merge_log.updates
        for f in update.values()
    ]


def _size(model: Adapter) -> float:
    """How far a model is from zero."""
    return math.hypot(*in_parallel(lambda module: _distance(model[module], None), list(model)))


def _distance(new: Factors, old: Factors | None) -> float:
    """How far a module has moved: in products, or in its parameters where it is a vector."""
    return product_change(new, old).norm if all(new.shape) else parameter_change(new, old)


def _estimate(factors: Factors, seed: int) -> float:
    """The norm of a product of high rank, such as a stack of all uploads, to some percent.

    From its products with 32 random vectors, of which it is the root mean square.
    """
    generator = torch.Generator().manual_seed(seed)
    probes = torch.randn(factors.shape[1], 32, generator=generator, dtype=torch.float64)
    image = factors.B.double() @ (factors.A.double() @ probes)
    return float(image.norm()) / math.sqrt(32)


def _reach(before: State, size: float, largest: Largest) -> float:
    """What the uploads and the model, of this size, leave a round to change it by.

    Where the model is in products, a change of parameters counts by what it does beside the
    other factor.
    """
    reach = [size]
    is_vector = not all(all(f.shape) for f in before.model.values())
    factor = max((_length(x) for f in before.model.values() for x in (f.B, f.A)), default=0.0)
    for kind, norm in largest.items():
        if kind == PRODUCT or is_vector:
            reach.append(norm)
        elif not kind.startswith(BESIDE):
            reach.append(norm * (2 * factor + norm))
    return max(reach)


def _length(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.float64))
