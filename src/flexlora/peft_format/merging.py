"""FlexLoRA's server step as a tool: merge PEFT adapters of any ranks and scales."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from flexlora.errors import AdapterError
from flexlora.lowrank import Adapter, Factors, LowRankSum, normalized
from flexlora.peft_format import reading, writing
from flexlora.peft_format.reading import PeftAdapter
from flexlora.peft_format.weights import WEIGHTS

ROUNDING = 1e-10
"""Singular values below this share of the largest are rounding errors, not content."""

StrPath = str | os.PathLike[str]
Rank = int | float | Literal["max"]
"""A rank, a share of the energy from 0 to 1 (both excluded), or ``max`` for no loss."""


@dataclass(frozen=True)
class MergedModule:
    """One module of the result.

    ``summed_rank`` is the sum of the inputs' ranks, ``rank`` that of the result before padding.
    ``energy`` is the share of the squared singular values that ``rank`` keeps, and
    ``squared_norm`` their sum, before truncation. ``absent_from`` are the adapters without
    this module, whose update of it counts as zero.
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
    only some of the adapters have, and a rank that was not needed.
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


def merge(
    adapters: Sequence[StrPath],
    out: StrPath,
    weights: Sequence[float] | None = None,
    rank: Rank = "max",
    base: str | None = None,
    dtype: torch.dtype = torch.float32,
    replace: bool = False,
) -> MergeResult:
    """Write the weighted mean of adapters' products ``B @ A`` to the folder ``out``.

    ``weights`` are relative: they are divided by their sum, and are equal by default. ``rank``
    is a rank, a share below 1 of the energy (the sum of the squared singular values) that
    every module must keep, or ``max`` for no loss. A module that an adapter lacks counts as an
    update of zero with that adapter's weight. ``base`` names the base model of the result and
    allows adapters whose configurations name different ones. ``replace`` replaces an adapter
    in ``out``. The base model is never loaded; one module of all adapters is in memory at a
    time, besides the result. Nothing is written if anything fails.

    Raises:
        AdapterError: an adapter cannot be read, shapes or base models differ, a weight or the
            rank is invalid, or ``out`` is in use.
    """
    directories = _directories(adapters)
    writing.check_target(Path(out).resolve(), replace)
    inputs = [reading.read(directory) for directory in directories]
    shares = normalized(_checked_weights(weights, len(inputs)))
    _check_rank(rank)
    base_model = base or _common_base(inputs)
    merged: dict[str, Factors] = {}
    modules = []
    for module in sorted({module for each in inputs for module in each.adapter}, key=_natural):
        terms = [
            (share, each.adapter[module])
            for share, each in zip(shares, inputs, strict=True)
            if module in each.adapter
        ]
        _check_shapes(module, [factors for _, factors in terms])
        absent = tuple(each.directory for each in inputs if module not in each.adapter)
        merged[module], facts = _merged(module, LowRankSum.of(terms), rank, absent)
        modules.append(facts)
    writing.write(Adapter(merged), out, base_model=base_model, dtype=dtype, replace=replace)
    return MergeResult(
        directory=Path(out),
        modules=tuple(modules),
        rank=max(module.rank for module in modules),
        bytes=(Path(out) / WEIGHTS).stat().st_size,
        notes=tuple(_notes(modules, len(inputs), rank)),
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


def _merged(
    module: str, total: LowRankSum, rank: Rank, absent_from: tuple[Path, ...]
) -> tuple[Factors, MergedModule]:
    svd = total.svd(rank if isinstance(rank, int) else None)
    content = int((ROUNDING * svd.S.max() < svd.S).sum()) if len(svd.S) else 0
    wanted = svd.rank_for(rank) if isinstance(rank, float) else rank
    final = max(content if wanted == "max" else min(int(wanted), content), 1)
    squared_norm = float(svd.S.double().square().sum()) + svd.beyond
    facts = MergedModule(module, total.rank, final, svd.energy(final), squared_norm, absent_from)
    return svd.factors(final).to(torch.float32), facts


def _notes(modules: Sequence[MergedModule], adapters: int, rank: Rank) -> Iterator[str]:
    """Sentences about modules that only some adapters have, and about an unneeded rank."""
    partial = [module for module in modules if module.absent_from]
    if partial:
        first = partial[0]
        yield (
            f"{len(partial)} of {len(modules)} modules are missing from some of the {adapters} "
            f"adapters, such as {first.module}, which is in {adapters - len(first.absent_from)} "
            f"of them. An adapter without a module counts there as an update of zero, with its "
            f"full weight."
        )
    largest = max(module.rank for module in modules)
    if isinstance(rank, int) and largest < rank:
        yield (
            f"The result has rank {largest}, below the {rank} given, because no module needs more."
        )


def _natural(module: str) -> list[tuple[int, str]]:
    """A key that sorts layer 2 before layer 10."""
    return [
        (int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", module)
    ]


def _directories(adapters: Sequence[StrPath]) -> list[Path]:
    if isinstance(adapters, str | os.PathLike):
        raise AdapterError(f"merge takes a list of folders, such as [{str(adapters)!r}].")
    if not adapters:
        raise AdapterError("There are no adapters to merge; give at least one folder.")
    return [Path(adapter) for adapter in adapters]


def _checked_weights(weights: Sequence[float] | None, count: int) -> list[float]:
    if weights is None:
        return [1.0] * count
    if len(weights) != count:
        raise AdapterError(f"Give a weight for each of {count} adapters, not {len(weights)}.")
    for weight in weights:
        if not 0 < weight < float("inf"):
            raise AdapterError(
                f"Weights must be positive and finite, got {weight}; leave out an adapter "
                f"that should not count."
            )
    return list(weights)


def _check_rank(rank: int | float | str) -> None:
    valid = rank == "max" or (rank >= 1 if isinstance(rank, int) else 0 < float(rank) < 1)
    if not valid:
        raise AdapterError(
            f"The rank is {rank}; give a whole number from 1, an energy share between 0 and 1, "
            "or max."
        )


def _common_base(adapters: Sequence[PeftAdapter]) -> str | None:
    folders: Mapping[str, Path] = {a.base_model: a.directory for a in adapters if a.base_model}
    if len(folders) > 1:
        names = ", ".join(f"{directory}: {base!r}" for base, directory in folders.items())
        raise AdapterError(
            f"The adapters name different base models ({names}); if they are the same model, "
            "give its name with --base."
        )
    return next(iter(folders), None)


def _check_shapes(module: str, factors: Sequence[Factors]) -> None:
    shapes = {f.shape for f in factors}
    if len(shapes) > 1:
        raise AdapterError(
            f"Module {module!r} differs in shape (out, in) between the adapters: "
            f"{sorted(shapes)}; merge only adapters of the same base model."
        )
