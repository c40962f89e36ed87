"""The commands on PEFT adapters: merge and check. No weights of a base model are loaded."""

from __future__ import annotations

import dataclasses
import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flexlora.errors import ConfigError

if TYPE_CHECKING:
    from flexlora.peft_format import MergeResult

FOLDED_ABOVE = 40
"""The number of modules above which ``merge`` prints a summary in place of its table."""


class Absent(StrEnum):
    """How an adapter counts for a module that it lacks."""

    zero = "zero"
    skip = "skip"


class Precision(StrEnum):
    """The precision of the written file."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


Adapters = Annotated[
    list[Path],
    typer.Argument(metavar="DIR...", help="PEFT adapters; of a run, its last round's."),
]
Out = Annotated[Path, typer.Option(metavar="DIR", help="A new folder for the merged adapter.")]
Weights = Annotated[
    str | None,
    typer.Option(
        metavar="3,1,2",
        help="Weights, one per adapter; they are normalised to sum to 1. Default: equal.",
    ),
]
Summed = Annotated[
    bool,
    typer.Option(
        "--sum",
        help="Do not normalise the weights, which may then be negative: the result is the weighted "
        "sum, e.g. --weights 1,-1 subtracts an adapter.",
    ),
]
Rank = Annotated[
    str,
    typer.Option(
        metavar="N|SHARE|max",
        help="Rank of the result: a number; the share of the squared singular values that every "
        "module must keep, e.g. 0.99; or max, which keeps everything.",
    ),
]
AbsentRule = Annotated[
    Absent,
    typer.Option(
        help="A module that an adapter lacks counts as an update of zero from it; or that adapter "
        "is skipped: the mean over those that have the module, as in a federation."
    ),
]
Dtype = Annotated[Precision, typer.Option(help="The precision of the written file.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace an adapter that is in --out already.")
]
BaseName = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="The base model's name to write; needed if they differ."),
]
Revision = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="The base model's revision; needed if they differ."),
]
TaskType = Annotated[
    str | None,
    typer.Option(metavar="TYPE", help="PEFT's task type, e.g. CAUSAL_LM; needed if they differ."),
]
Every = Annotated[
    bool,
    typer.Option("--modules", help=f"List the modules also if they are more than {FOLDED_ABOVE}."),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Checked = Annotated[
    Path, typer.Argument(metavar="DIR", help="A PEFT adapter; of a run, its last round's.")
]
BaseFolder = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="A folder with the base model's config.json: says exactly what PEFT would drop or "
        "add. No weights are read.",
    ),
]


def merge(
    adapters: Adapters,
    out: Out,
    weights: Weights = None,
    summed: Summed = False,
    rank: Rank = "max",
    absent: AbsentRule = Absent.zero,
    dtype: Dtype = Precision.float32,
    overwrite: Overwrite = False,
    base: BaseName = None,
    revision: Revision = None,
    task_type: TaskType = None,
    modules: Every = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Merge PEFT adapters of any ranks and scales into one.

    The result is the weighted mean of the products B @ A.
    Weights are normalised to sum to 1, unless --sum is given.
    A module that an adapter lacks counts as no update from that adapter, unless --absent skip.
    """
    import torch

    from flexlora.cli.outputs import refuse_parts_of_runs
    from flexlora.peft_format import merge as merge_adapters
    from flexlora.peft_format import parse_rank

    refuse_parts_of_runs(out, "--out")
    result = merge_adapters(
        adapters,
        out,
        _numbers(weights),
        parse_rank(rank),
        base,
        getattr(torch, dtype),
        overwrite,
        absent=absent.value,
        sum_weights=summed,
        revision=revision,
        task_type=task_type,
    )
    if as_json:
        print(_json(result))
    elif not quiet:
        _print_merge(result, modules)


def check(
    adapter: Checked, base: BaseFolder = None, quiet: Quiet = False, as_json: Json = False
) -> None:
    """Inspect a PEFT adapter, and list the programs that would misread it.

    Exit code 0: every program reads it alike.
    Exit code 1: one would misread or refuse it, or it is more than B @ A.
    Exit code 2: it is no adapter, or damaged.
    """
    from flexlora.peft_format import check as inspect

    report = inspect(adapter, base)
    if as_json:
        print(json.dumps(report.json(), indent=1))
    elif not quiet:
        for line in report.lines():
            print(line)
    if not report.alike:
        raise typer.Exit(1)


def _print_merge(result: MergeResult, every: bool) -> None:
    from flexlora.journal import size

    if every or len(result) <= FOLDED_ABOVE:
        print("summed rank   rank  energy kept  module")
        for facts in result:
            energy = f"{100 * facts.energy:.4f} %"
            print(f"{facts.summed_rank:>11}  {facts.rank:>5}  {energy:>11}  {facts.module}")
    else:
        ranks = [facts.rank for facts in result]
        print(
            f"modules: {len(result)}, of rank {min(ranks)} to {max(ranks)} (--modules lists them)"
        )
    lowest = min(result, key=lambda facts: facts.energy)
    print("energy: the sum of the squared singular values")
    print(f"energy kept: {100 * result.energy:.4f} % in all")
    print(f"least energy kept: {100 * lowest.energy:.4f} % in {lowest.module}")
    for note in result.notes:
        print(f"note: {note}")
    print(f"written: {result.directory} (rank {result.rank}, {size(result.bytes)})")


def _json(result: MergeResult) -> str:
    content = {
        "directory": str(result.directory),
        "rank": result.rank,
        "bytes": result.bytes,
        "energy": result.energy,
        "notes": result.notes,
        "modules": [dataclasses.asdict(facts) for facts in result],
    }
    return json.dumps(content, indent=1, default=str)


def _numbers(text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--weights takes numbers such as 3,1,2, not {text!r}.") from None
