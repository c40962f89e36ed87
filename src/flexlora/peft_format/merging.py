"""FlexLoRA's server step as a tool: merge PEFT adapters of any ranks and scales."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from flexlora.errors import AdapterError
from flexlora.lowrank import Adapter, Factors, LowRankSum, normalized
from flexlora.peft_format import reading, writing
from flexlora.peft_format.reading import PeftAdapter

ROUNDING = 1e-10
"""Singular values below this share of the largest are rounding, not content."""


@dataclass(frozen=True)
class Kept:
    """What became of one module: its rank before and after, and the energy share kept."""

    module: str
    summed_rank: int
    rank: int
    energy: float


def merge(
    directories: Sequence[str | Path],
    out: str | Path,
    weights: Sequence[float] | None = None,
    rank: int | float | Literal["max"] = "max",
    base: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> list[Kept]:
    """Write the weighted mean of adapters' products to ``out`` and say what was kept.

    ``weights`` are relative, equal by default. ``rank`` is a number, an energy share below 1
    that every module must keep, or ``max`` for no loss. A module that an adapter lacks
    counts as no update there. ``base`` names the base model of the result and allows
    adapters whose configs name different ones. The base model itself is never loaded; one
    module of all adapters is in memory at a time. Nothing is written if anything fails.

    Raises:
        AdapterError: an adapter cannot be read, shapes or base models differ, or a weight or
            the rank makes no sense.
    """
    folders = [Path(directory) for directory in directories]
    adapters = [reading.read(folder) for folder in folders]
    p = normalized(_checked_weights(weights, len(adapters)))
    _check_rank(rank)
    named = base or _common_base(adapters, folders)
    modules = dict.fromkeys(module for each in adapters for module in each.adapter)
    merged: dict[str, Factors] = {}
    kept = []
    for module in modules:
        terms = [
            (share, each.adapter[module])
            for share, each in zip(p, adapters, strict=True)
            if module in each.adapter
        ]
        _check_shapes(module, [f for _, f in terms])
        merged[module], facts = _merged(module, LowRankSum.of(terms), rank)
        kept.append(facts)
    writing.write(Adapter(merged), Path(out), base_model=named, dtype=dtype)
    return kept


def parse_rank(text: str) -> int | float | Literal["max"]:
    """A rank as people write it: ``16``, ``0.99`` or ``max``.

    Raises:
        AdapterError: it is none of these.
    """
    if text == "max":
        return "max"
    try:
        rank = int(text) if text.lstrip("+-").isdigit() else float(text)
    except ValueError:
        raise AdapterError(
            f"--rank is {text!r}; give a number such as 16, an energy share such as 0.99, or max."
        ) from None
    _check_rank(rank)
    return rank


def _merged(
    module: str, total: LowRankSum, rank: int | float | Literal["max"]
) -> tuple[Factors, Kept]:
    svd = total.svd(rank if isinstance(rank, int) else None)
    content = int((ROUNDING * svd.S.max() < svd.S).sum()) if len(svd.S) else 0
    wanted = svd.rank_for(rank) if isinstance(rank, float) else rank
    final = max(content if wanted == "max" else min(int(wanted), content), 1)
    return svd.factors(final).to(torch.float32), Kept(module, total.rank, final, svd.energy(final))


def _checked_weights(weights: Sequence[float] | None, count: int) -> list[float]:
    if weights is None:
        return [1.0] * count
    if len(weights) != count:
        raise AdapterError(f"Give a weight for each of {count} adapters, not {len(weights)}.")
    for weight in weights:
        if not 0 < weight < float("inf"):
            raise AdapterError(f"Weights must be positive and finite, got {weight}.")
    return list(weights)


def _check_rank(rank: int | float | str) -> None:
    valid = rank == "max" or (rank >= 1 if isinstance(rank, int) else 0 < float(rank) < 1)
    if not valid:
        raise AdapterError(
            f"The rank is {rank}; give a whole number from 1, an energy share between 0 and 1, "
            "or max."
        )


def _common_base(adapters: Sequence[PeftAdapter], directories: Sequence[Path]) -> str | None:
    named = {a.base_model: d for a, d in zip(adapters, directories, strict=True) if a.base_model}
    if len(named) > 1:
        said = ", ".join(f"{directory}: {base!r}" for base, directory in named.items())
        raise AdapterError(
            f"The adapters name different base models ({said}); if they are the same model, "
            "say which with --base."
        )
    return next(iter(named), None)


def _check_shapes(module: str, factors: Sequence[Factors]) -> None:
    shapes = {f.shape for f in factors}
    if len(shapes) > 1:
        raise AdapterError(
            f"Module {module!r} differs in shape (out, in) between the adapters: "
            f"{sorted(shapes)}; they are not of one base model."
        )
