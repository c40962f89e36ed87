"""FlexLoRA's server step as a tool: merge PEFT adapters of any ranks and scales."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from flexlora.errors import AdapterError
from flexlora.lowrank import Adapter, Factors, LowRankSum
from flexlora.peft_format import reading, writing
from flexlora.peft_format.agreement import Agreement, agreement
from flexlora.peft_format.layouts import WEIGHTS, natural
from flexlora.peft_format.paths import same_layers
from flexlora.peft_format.reading import Layer, PeftAdapter
from flexlora.peft_format.targets import common_targets
from flexlora.peft_format.whole import mean_of_whole, saved_names

ROUNDING = 1e-10
"""Singular values below this share of the largest are rounding errors, not content."""

CANCELLED = 1e-12
"""The same, as a share of the terms, where terms are subtracted and may cancel."""

LEAST_SHARE = ROUNDING
"""The smallest ratio of two weights: below it the smaller one's adapter is lost in rounding."""

MOST_LOST = 2**-6
"""The share of a factor's largest value that the file may lose; bfloat16 rounds by 2^-9."""

StrPath = str | os.PathLike[str]
Rank = int | float | Literal["max"]
"""A rank, a share of the energy from 0 to 1 (both excluded), or ``max`` for no loss."""

Absent = Literal["zero", "skip"]
"""How an adapter counts for a module that it lacks.

``zero``: as an update of zero, so that the result is the mean of the adapted models. ``skip``: not
at all, so that each module is the mean over the adapters that have it, as in a federation.
"""


_RULES = {
    "zero": "An adapter without a module counts there as an update of zero, with its full weight "
    "(--absent skip takes the mean over the adapters that have the module).",
    "skip": "Each of these is the mean over the adapters that have it (--absent skip).",
    "sum": "Each of these is the sum over the adapters that have it (--sum).",
}
"""What ``merge`` says of modules that only some adapters have."""


@dataclass(frozen=True)
class MergedModule:
    """One module of the result.

    ``summed_rank`` is the sum of the inputs' ranks, ``rank`` that of the result before padding.
    ``energy`` is the share of the squared singular values that ``rank`` keeps, and
    ``squared_norm`` their sum, before truncation. ``absent_from`` are the adapters without
    this module.
    """

    module: str
    summed_rank: int
    rank: int
    energy: float
    squared_norm: float
    absent_from: tuple[Path, ...] = ()


@dataclass(frozen=True)
class MergeResult:
    """What ``merge`` wrote; iterates over its modules, sorted by name with numbers in order.

    ``rank`` is that of the written file, in which all modules are padded to one rank, and
    ``bytes`` its size. ``notes`` are sentences about what a reader may not expect: modules that
    only some of the adapters have, paths that were changed, what was left out.
    """

    directory: Path
    modules: tuple[MergedModule, ...]
    rank: int
    bytes: int
    notes: tuple[str, ...] = ()

    @property
    def energy(self) -> float:
        """The share of the squared singular values of all modules that the result retains."""
        total = sum(module.squared_norm for module in self.modules)
        retained = sum(module.squared_norm * module.energy for module in self.modules)
        return retained / total if total > 0 else 1.0

    def __iter__(self) -> Iterator[MergedModule]:
        return iter(self.modules)

    def __len__(self) -> int:
        return len(self.modules)


@dataclass(frozen=True)
class _Input:
    """One adapter of a merge: its weight, and its modules by their path in the result."""

    adapter: PeftAdapter
    weight: float
    stored: Mapping[str, str]

    def layer(self, path: str) -> Layer:
        return self.adapter.layers[self.stored[path]]

    def factors(self, path: str) -> Factors:
        return self.adapter.adapter[self.stored[path]]


def merge(
    adapters: Sequence[StrPath],
    out: StrPath,
    weights: Sequence[float] | None = None,
    rank: Rank = "max",
    base: str | None = None,
    dtype: torch.dtype = torch.float32,
    replace: bool = False,
    *,
    absent: Absent = "zero",
    sum_weights: bool = False,
    revision: str | None = None,
    task_type: str | None = None,
) -> MergeResult:
    """Write the weighted mean of adapters' products ``B @ A`` to the folder ``out``.

    ``adapters`` are PEFT adapters, or runs, of which the last round's adapter counts. ``weights``
    are relative: they are divided by their sum, and are equal by default. With ``sum_weights`` they
    are not divided and may be negative: the result is the weighted sum. ``rank`` is a rank, a
    share below 1 of the energy (the sum of the squared singular values) that every module must
    keep, or ``max`` for no loss. ``absent`` is how an adapter counts for a module that it lacks.
    ``base``, ``revision`` and ``task_type`` of the result are those that the adapters agree on, and
    must be given if they differ. ``dtype`` is that of the written file. ``replace`` replaces an
    adapter in ``out``. The base model is never loaded; one module of all adapters is in memory at
    a time, besides the result. Modules that all adapters trained as a whole (``modules_to_save``)
    are averaged with the same weights. Nothing is written if anything fails.

    Raises:
        AdapterError: an adapter cannot be read, shapes, base models, revisions or task types
            differ, a weight or the rank is invalid, or ``out`` is in use.
    """
    directories = _directories(adapters)
    writing.check_target(Path(out).resolve(), replace)
    read = [reading.open_adapter(directory) for directory in directories]
    for adapter in read:
        reading.refuse_dropped(adapter)
    checked = _checked_weights(weights, len(read), sum_weights)
    _check_rank(rank)
    if absent not in ("zero", "skip"):
        raise AdapterError(f"absent is {absent!r}; give 'zero' or 'skip'.")
    agreed = agreement(read, base, revision, task_type)
    stored, path_notes = same_layers([each.layers for each in read], [*map(str, directories)])
    inputs = [_Input(*parts) for parts in zip(read, checked, stored, strict=True)]
    total = None if sum_weights else sum(checked)
    whole = mean_of_whole(read, [weight / (total or 1.0) for weight in checked])
    merged, modules = _modules(inputs, rank, total, absent)
    _write(merged, whole, inputs, agreed, Path(out), dtype, replace)
    return MergeResult(
        directory=Path(out),
        modules=tuple(modules),
        rank=max(module.rank for module in modules),
        bytes=(Path(out) / WEIGHTS).stat().st_size,
        notes=(
            *_of_inputs(read),
            *agreed.notes,
            *path_notes,
            *_whole_notes(read[0]),
            *_notes(modules, len(read), rank, "sum" if sum_weights else absent),
        ),
    )


def _write(
    merged: Mapping[str, Factors],
    whole: Mapping[str, torch.Tensor],
    inputs: Sequence[_Input],
    agreed: Agreement,
    out: Path,
    dtype: torch.dtype,
    replace: bool,
) -> None:
    _refuse_vanished(merged, dtype)
    writing.write(
        Adapter(merged).to(torch.float32),
        out,
        base_model=agreed.base_model,
        dtype=dtype,
        task_type=agreed.task_type,
        target_modules=common_targets([(each.adapter.targets, each.stored) for each in inputs]),
        embeddings={p for each in inputs for p in each.stored if each.layer(p).embedding},
        whole=whole,
        settings=agreed.settings | {"modules_to_save": saved_names(inputs[0].adapter) or None},
        replace=replace,
    )


def parse_rank(text: str) -> Rank:
    """A rank as given on the command line: ``16``, ``0.99`` or ``max``.

    Raises:
        AdapterError: it is none of these.
    """
    if text == "max":
        return "max"
    try:
        rank = int(text) if text.lstrip("+-").isdigit() else float(text)
    except ValueError:
        raise AdapterError(
            f"--rank is {text!r}; give a rank such as 16, an energy share such as 0.99, or max."
        ) from None
    _check_rank(rank)
    return rank


def _modules(
    inputs: Sequence[_Input], rank: Rank, total: float | None, absent: Absent
) -> tuple[dict[str, Factors], list[MergedModule]]:
    """The merged modules, in the order of their numbers.

    Weights are divided by ``total`` (or, with ``skip``, by the sum of those that count), unless it
    is None.
    """
    merged, facts = {}, []
    for path in sorted({path for each in inputs for path in each.stored}, key=natural):
        sources = [each for each in inputs if path in each.stored]
        _check_layers(path, sources)
        divisor = sum(each.weight for each in sources) if absent == "skip" else total
        terms = [
            (each.weight if total is None else each.weight / (divisor or 1.0), each.factors(path))
            for each in sources
        ]
        lacking = tuple(each.adapter.directory for each in inputs if path not in each.stored)
        merged[path], fact = _merged(path, LowRankSum.of(terms), rank, lacking)
        facts.append(fact)
    return merged, facts


def _merged(
    module: str, total: LowRankSum, rank: Rank, absent_from: tuple[Path, ...]
) -> tuple[Factors, MergedModule]:
    svd = total.svd(rank if isinstance(rank, int) else None)
    # Terms that cancel leave rounding errors of their own size.
    size = max(abs(weight) * float(f.B.norm() * f.A.norm()) for weight, f in total.terms)
    cancelled = CANCELLED * size if any(weight < 0 for weight, _ in total.terms) else 0.0
    largest = float(svd.S.max()) if len(svd.S) else 0.0
    content = int((max(ROUNDING * largest, cancelled) < svd.S).sum())
    wanted = svd.rank_for(rank) if isinstance(rank, float) else rank
    final = max(content if wanted == "max" else min(int(wanted), content), 1)
    squared_norm = float(svd.S.double().square().sum()) + svd.beyond
    facts = MergedModule(module, total.rank, final, svd.energy(final), squared_norm, absent_from)
    factors = svd.factors(final)
    return (factors if content else Factors(0 * factors.B, 0 * factors.A)), facts


def _of_inputs(adapters: Sequence[PeftAdapter]) -> Iterator[str]:
    """The notes of the adapters; one that several have is said once, with their folders."""
    folders: dict[str, list[Path]] = {}
    for adapter in adapters:
        for note in adapter.notes:
            folders.setdefault(note, []).append(adapter.directory)
    for note, found in folders.items():
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        yield f"{found[0]}{more}: {note}" if len(adapters) > 1 else note


def _whole_notes(adapter: PeftAdapter) -> Iterator[str]:
    names = saved_names(adapter)
    if names:
        yield (
            f"The whole tensors of {', '.join(names)} (modules_to_save) are averaged with the same "
            f"weights; vLLM and llama.cpp do not load them."
        )


def _notes(
    modules: Sequence[MergedModule], adapters: int, rank: Rank, rule: Literal["zero", "skip", "sum"]
) -> Iterator[str]:
    """Sentences about modules that only some adapters have, and about an unneeded rank."""
    partial = [module for module in modules if module.absent_from]
    if partial:
        first = partial[0]
        nothing = " No module is in all of them." if len(partial) == len(modules) else ""
        yield (
            f"{len(partial)} of {len(modules)} modules are missing from some of the {adapters} "
            f"adapters, such as {first.module}, which is in {adapters - len(first.absent_from)} "
            f"of them.{nothing} {_RULES[rule]}"
        )
    largest = max(module.rank for module in modules)
    if isinstance(rank, int) and largest < rank:
        yield (
            f"The result has rank {largest}, below the {rank} given, because no module needs more."
        )


def _directories(adapters: Sequence[StrPath]) -> list[Path]:
    if isinstance(adapters, str | os.PathLike):
        raise AdapterError(f"merge takes a list of folders, such as [{str(adapters)!r}].")
    if not adapters:
        raise AdapterError("There are no adapters to merge; give at least one folder.")
    return [Path(adapter) for adapter in adapters]


def _checked_weights(weights: Sequence[float] | None, count: int, summed: bool) -> list[float]:
    if weights is None:
        return [1.0] * count
    if len(weights) != count:
        raise AdapterError(f"Give a weight for each of {count} adapters, not {len(weights)}.")
    for weight in weights:
        if math.isfinite(weight) and (weight > 0 or (summed and weight < 0)):
            continue
        raise AdapterError(
            f"Weights must be finite and not zero, got {weight}; leave out an adapter that should "
            f"not count."
            if summed
            else f"Weights must be positive and finite, got {weight}; leave out an adapter that "
            f"should not count, or add and subtract with --sum (from Python: sum_weights=True)."
        )
    largest, smallest = max(map(abs, weights)), min(map(abs, weights))
    if not math.isfinite(sum(map(abs, weights))) or smallest < LEAST_SHARE * largest:
        raise AdapterError(
            f"The weights {largest:g} and {smallest:g} cannot be added without losing one of them; "
            f"give weights of ordinary size such as 3,1,2, or leave out the adapter that should "
            f"not count."
        )
    return list(weights)


def _refuse_vanished(merged: Mapping[str, Factors], dtype: torch.dtype) -> None:
    """Refuse a result that the precision of its file cannot hold."""
    for path, factors in merged.items():
        for exact in (factors.B, factors.A):
            lost = exact - exact.to(torch.float32).to(dtype).to(torch.float64)
            largest = float(exact.abs().max())
            if not float(lost.abs().max()) <= MOST_LOST * largest:
                raise AdapterError(
                    f"The result's module {path!r} has values of up to {largest:.1g}, which "
                    f"{dtype} cannot hold; give --dtype float32, or weights of ordinary size."
                )


def _check_rank(rank: int | float | str) -> None:
    valid = rank == "max" or (rank >= 1 if isinstance(rank, int) else 0 < float(rank) < 1)
    if not valid:
        raise AdapterError(
            f"The rank is {rank}; give a whole number from 1, an energy share between 0 and 1, "
            "or max."
        )


def _check_layers(path: str, sources: Sequence[_Input]) -> None:
    layers = [each.layer(path) for each in sources]
    if len({(layer.shape, layer.embedding) for layer in layers}) > 1:
        shapes = ", ".join(
            f"{each.adapter.directory}: {layer.shape}{' of an embedding' * layer.embedding}"
            for each, layer in zip(sources, layers, strict=True)
        )
        raise AdapterError(
            f"Module {path!r} differs in shape (out, in) between the adapters ({shapes}); merge "
            f"only adapters of the same base model."
        )
