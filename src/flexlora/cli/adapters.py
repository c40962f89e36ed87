"""The commands on PEFT adapters: merge and check. No base model is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flexlora.errors import ConfigError


def merge(
    adapters: Annotated[
        list[Path], typer.Argument(metavar="DIR...", help="The PEFT adapters to merge.")
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="A new folder for the merged adapter.")],
    weights: Annotated[
        str | None,
        typer.Option(metavar="3,1,2", help="Relative weights, one per adapter; default: equal."),
    ] = None,
    rank: Annotated[
        str,
        typer.Option(
            metavar="N|SHARE|max",
            help="Rank of the result: a number; the share of the squared singular values that "
            "every module must keep, e.g. 0.99; or max, which keeps everything.",
        ),
    ] = "max",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an adapter that is in --out already.")
    ] = False,
    base: Annotated[
        str | None, typer.Option(help="The name of the base model to write into the result.")
    ] = None,
) -> None:
    """Merge PEFT adapters of any ranks and scales into one.

    The result is the weighted mean of the products B @ A.
    Weights are normalised to sum to 1.
    A module that an adapter lacks counts as no update from that adapter.
    """
    from flexlora.journal import size
    from flexlora.peft_format import merge as merge_adapters
    from flexlora.peft_format import parse_rank

    result = merge_adapters(
        adapters, out, _numbers(weights), parse_rank(rank), base, replace=overwrite
    )
    print("summed rank   rank  energy kept  module")
    for facts in result:
        energy = f"{100 * facts.energy:.4f} %"
        print(f"{facts.summed_rank:>11}  {facts.rank:>5}  {energy:>11}  {facts.module}")
    lowest = min(result, key=lambda facts: facts.energy)
    print("energy: the sum of the squared singular values")
    print(f"energy kept: {100 * result.energy:.4f} % in all")
    print(f"least energy kept: {100 * lowest.energy:.4f} % in {lowest.module}")
    for note in result.notes:
        print(f"note: {note}")
    print(f"written: {out} (rank {result.rank}, {size(result.bytes)})")


def check(
    adapter: Annotated[Path, typer.Argument(metavar="DIR", help="A PEFT adapter.")],
) -> None:
    """Inspect a PEFT adapter, and list the programs that would misread it.

    The exit code is 1 if a program would misread or refuse it.
    """
    from flexlora.peft_format import check as inspect

    report = inspect(adapter)
    for line in report.lines():
        print(line)
    if not report.alike:
        raise typer.Exit(1)


def _numbers(text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--weights takes numbers such as 3,1,2, not {text!r}.") from None
