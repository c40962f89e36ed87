"""Checking a PEFT adapter directory: its values, and which programs would misread it."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexlora.lowrank import Factors
from flexlora.peft_format.base_model import base_modules
from flexlora.peft_format.config import Unsupported, read_config
from flexlora.peft_format.consumers import variant_verdicts, verdicts
from flexlora.peft_format.layouts import WEIGHTS, locate
from flexlora.peft_format.loading import loading, notes, warnings
from flexlora.peft_format.patterns import matched
from flexlora.peft_format.reading import PeftAdapter, open_adapter
from flexlora.peft_format.report import Report

LARGE_RMS = 0.1
"""The root mean square from which an update counts as very large.

Entries of language models' weight matrices have one of about 0.01 to 0.05; an update beyond
this limit dominates them.
"""


def check(directory: str | os.PathLike[str], base: str | os.PathLike[str] | None = None) -> Report:
    """Read an adapter, one module in memory at a time, and report which programs misread it.

    ``directory`` may be the folder of a run; its last round's adapter is checked. With ``base``, a
    folder with the base model's ``config.json``, the report says exactly which tensors PEFT would
    drop and which modules it would add; no weights of it are read.

    Raises:
        AdapterError: the directory does not contain a valid LoRA adapter: something is missing,
            malformed, inconsistent, NaN or infinite. An adapter that is valid, but more than
            ``B @ A``, is reported with its ``refusal``.
    """
    directory = locate(Path(directory))
    config = read_config(directory)
    try:
        stored = open_adapter(directory)
    except Unsupported as error:
        return _unsupported(directory, config, str(error))
    model = None if base is None else base_modules(base, stored.layers, stored.task_type)
    loaded = loading(stored, model)
    values = [_summary(module, factors) for module, factors in stored.adapter.items()]
    largest = max(values, key=lambda value: value.norm)
    return Report(
        directory=directory,
        base_model=stored.base_model,
        task_type=stored.task_type,
        bytes=stored.weights.bytes,
        modules=len(stored.layers),
        parameters=sum(layer.parameters for layer in stored.layers.values()),
        ranks=Counter(stored.ranks.values()),
        scales=tuple(sorted({layer.scale for layer in stored.layers.values()})),
        dtypes=_dtypes(stored),
        largest=(largest.module, largest.norm),
        verdicts=verdicts(stored, loaded.verdict),
        dropped=loaded.dropped,
        added=loaded.added,
        warnings=(*_value_warnings(values), *_alpha_warnings(stored), *warnings(stored)),
        notes=(*stored.notes, *notes(stored, model), *_padding(values)),
    )


def _dtypes(stored: PeftAdapter) -> tuple[str, ...]:
    dtypes = {tensor.dtype for layer in stored.layers.values() for tensor in (layer.A, layer.B)}
    return tuple(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))


@dataclass(frozen=True)
class _Summary:
    """The values of one module's update.

    ``rms`` is the root mean square of its entries; ``padding`` is the number of rank-one
    components of which both ``B`` and ``A`` are zero.
    """

    module: str
    norm: float
    rms: float
    rank: int
    padding: int


def _summary(module: str, factors: Factors) -> _Summary:
    B, A = factors.B.double(), factors.A.double()
    # ||B A||^2 = sum((B'B) * (A A')) needs only rank x rank matrices.
    square = float(((B.T @ B) * (A @ A.T)).sum())
    norm = math.sqrt(max(square, 0.0))
    padding = int(((B == 0).all(dim=0) & (A == 0).all(dim=1)).sum())
    out, width = factors.shape
    return _Summary(module, norm, norm / math.sqrt(out * width), factors.rank, padding)


def _value_warnings(values: Sequence[_Summary]) -> list[str]:
    warnings = []
    zero = [value.module for value in values if value.norm == 0]
    if len(zero) == len(values):
        warnings.append("the update is zero everywhere; the adapter is untrained.")
    elif zero:
        warnings.append(
            f"{len(zero)} of {len(values)} modules have an update of zero, such as {zero[0]}; "
            f"they are untrained."
        )
    large = [value for value in values if not value.rms <= LARGE_RMS]
    if large:
        worst = max(large, key=lambda value: value.rms)
        warnings.append(
            f"{len(large)} of {len(values)} modules have very large updates, worst "
            f"{worst.module} with entries of {worst.rms:.3g} (root mean square); training "
            f"diverged, or alpha is wrong."
        )
    return warnings


def _alpha_warnings(adapter: PeftAdapter) -> list[str]:
    warnings = []
    if any(layer.alpha <= 0 for layer in adapter.layers.values()):
        warnings.append("lora_alpha is zero or negative for some modules; probably a mistake.")
    patterns = adapter.settings.alpha_pattern or {}
    values = matched(patterns, list(adapter.layers), "alpha_pattern")
    ambiguous = [module for module, alphas in values.items() if len(set(alphas)) > 1]
    if ambiguous:
        warnings.append(
            f"several alpha_pattern entries match {len(ambiguous)} modules, such as "
            f"{ambiguous[0]}, and the first counts; PEFT sorts them on saving, so that the "
            f"scale may differ from the one in training."
        )
    return warnings


def _padding(values: Sequence[_Summary]) -> list[str]:
    padding = sum(value.padding for value in values)
    if not padding:
        return []
    return [
        f"{padding} of {sum(value.rank for value in values)} rank-one components are zero in "
        f"both B and A. This is the padding of modules to one rank and does not change the "
        f"update; in further training these components would stay zero."
    ]


def _unsupported(directory: Path, config: Mapping[str, Any], refusal: str) -> Report:
    weights = directory / WEIGHTS
    base, task = config.get("base_model_name_or_path"), config.get("task_type")
    return Report(
        directory=directory,
        base_model=base if isinstance(base, str) else None,
        task_type=task if isinstance(task, str) else None,
        bytes=weights.stat().st_size if weights.is_file() else 0,
        refusal=refusal,
        verdicts=variant_verdicts(config),
    )
