"""Modules that were trained as a whole beside the factors: PEFT's ``modules_to_save``."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from flexlora.errors import AdapterError
from flexlora.peft_format.names import is_part
from flexlora.peft_format.reading import PeftAdapter
from flexlora.storage.untrusted import short


def mean_of_whole(adapters: Sequence[PeftAdapter], weights: Sequence[float]) -> dict[str, Tensor]:
    """The mean of the tensors of whole modules, by the paths of the parameters, in float64.

    ``weights`` are those of the adapters and must sum to 1, as these tensors are not updates: they
    stand for the base model's. One tensor is in memory at a time, beside the result.

    Raises:
        AdapterError: only some adapters have a tensor, so that the others have the base model's,
            which is not known; shapes differ; a value is not finite; or the weights sum to another
            number than 1.
    """
    for adapter in adapters:
        _refuse_others(adapter, adapters[0])
    if not adapters[0].parts.whole:
        return {}
    tied = [adapter.directory for adapter in adapters if adapter.targets.tied]
    if tied:
        raise AdapterError(
            f"{tied[0]} has whole tensors ({', '.join(saved_names(adapters[0]))}: modules_to_save) "
            f"that are tied to others of the base model (ensure_weight_tying), which is not "
            f"supported; merge it into its base model with PEFT."
        )
    if not math.isclose(sum(weights), 1.0, rel_tol=1e-9):
        raise AdapterError(
            f"{adapters[0].directory} has whole tensors ({', '.join(saved_names(adapters[0]))}: "
            f"modules_to_save), of which a weighted sum with weights that sum to "
            f"{sum(weights):g} is not defined; leave --sum out or give weights that sum to 1."
        )
    means: dict[str, Tensor] = {}
    for path in adapters[0].parts.whole:
        for adapter, weight in zip(adapters, weights, strict=True):
            values = weight * _values(adapter, path)
            means[path] = means[path].add_(values) if path in means else values
    return means


def saved_names(adapter: PeftAdapter) -> list[str]:
    """``modules_to_save`` without the names of which there are no tensors.

    PEFT adds ``classifier`` and ``score`` to those of every classifier.
    """
    return sorted(
        name
        for name in adapter.targets.saved
        if any(is_part(path, [name]) for path in adapter.parts.whole)
    )


def _refuse_others(adapter: PeftAdapter, first: PeftAdapter) -> None:
    """Refuse whole tensors that are not those of the first adapter."""
    other = {*adapter.parts.whole} ^ {*first.parts.whole}
    if other:
        theirs = min(other) in adapter.parts.whole
        has, lacks = (adapter, first) if theirs else (first, adapter)
        raise AdapterError(
            f"{has.directory} has the whole tensor {short(min(other))} (modules_to_save), and "
            f"{lacks.directory} does not, so that it has the base model's, which is not known "
            f"here; merge only adapters that all have it."
        )
    for path in first.parts.whole:
        shapes = [each.weights.tensors[each.parts.whole[path]].shape for each in (adapter, first)]
        if shapes[0] != shapes[1]:
            raise AdapterError(
                f"The whole tensor {short(path)} has the shape {list(shapes[0])} in "
                f"{adapter.directory} and {list(shapes[1])} in {first.directory}; merge only "
                f"adapters of the same base model."
            )


def _values(adapter: PeftAdapter, path: str) -> Tensor:
    (values,) = adapter.weights.read(adapter.parts.whole[path])
    if not values.isfinite().all():
        raise AdapterError(
            f"{adapter.weights.path}: {short(path)} contains NaN or infinite values; the training "
            f"diverged, so take an earlier checkpoint."
        )
    return values.double()
