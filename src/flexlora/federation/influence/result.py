"""Whether what a round has made may become the model: the bounds that uploads must meet."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch

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
            sizes = [float(torch.linalg.vector_norm(x, dtype=torch.float64)) for x in (f.B, f.A)]
            if not all(size <= LARGEST_FACTOR for size in sizes):
                return (
                    f"A factor of module {module!r} of {place} has the norm {max(sizes):.3g}; what "
                    f"clients start from must be at most {LARGEST_FACTOR:g}."
                )
    if steps_freely or not largest:
        return None
    step, limit = _step(before, after), LARGEST_STEP * _reach(before, largest)
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


def _step(before: State, after: State) -> float:
    """How far a round has moved the model and every client's base, in products."""

    def moved(module: str) -> float:
        new, old = after.model[module], before.model.get(module)
        if old is not None and old.shape != new.shape:
            old = None  # it has another form from this round on
        return _distance(new, old)

    squares = [norm**2 for norm in in_parallel(moved, list(after.model))]
    for round, update in after.merge_log.updates.items():
        if round not in before.merge_log.updates:
            squares += [_estimate(f, round) ** 2 for f in update.values()]
    return math.sqrt(math.fsum(squares))


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


def _reach(before: State, largest: Largest) -> float:
    """What the uploads and the model leave a round to change it by.

    Where the model is in products, a change of parameters counts by what it does beside the
    other factor.
    """
    modules = list(before.model.values())
    reach = [math.sqrt(math.fsum(_distance(f, None) ** 2 for f in modules))]
    sizes = [float(x.double().norm()) for f in modules for x in (f.B, f.A)]
    for kind, norm in largest.items():
        if kind == PRODUCT or not all(all(f.shape) for f in modules):
            reach.append(norm)
        elif not kind.startswith(BESIDE):
            reach.append(norm * (2 * max(sizes, default=0.0) + norm))
    return max(reach)
