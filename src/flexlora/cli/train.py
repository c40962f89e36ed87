"""The command that trains adapters without a federation."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flexlora.cli.configs import refuse_missing
from flexlora.cli.interrupts import STOPPED
from flexlora.cli.sentences import notices
from flexlora.journal import counted, duration

if TYPE_CHECKING:
    from flexlora.training.finished import JobResult

Changes = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Change a setting of all jobs, e.g. defaults.rank=16."
    ),
]
OutFolder = Annotated[
    Path | None,
    typer.Option(
        "--out", metavar="DIR", help="The adapters' folder; default: run.folder or runs/JOBS."
    ),
]


def train(
    path: Annotated[Path, typer.Argument(metavar="JOBS.toml", help="The file of jobs.")],
    changes: Changes = None,
    out: OutFolder = None,
) -> None:
    """Train adapters of different ranks and settings on one base model, several at a time.

    Each is written to a PEFT directory of its own as soon as it is trained.
    The same command continues after an interruption, and trains jobs that were added.
    """
    import torch

    from flexlora.cli.progress import Display
    from flexlora.config import load_jobs
    from flexlora.federation import jobs
    from flexlora.training.adapters import trained_adapters

    refuse_missing(path)
    results: list[JobResult] = []
    with Display() as display:
        file = load_jobs(path, changes or ())
        torch.set_num_threads(file.run.threads or torch.get_num_threads())
        target = out or Path(file.run.folder or f"runs/{path.stem}")
        display.meter.begin("reading the data")
        planned, cache = jobs.prepared(file)
        try:
            for result in trained_adapters(
                file.model,
                planned,
                target,
                at_once=file.run.at_once,
                cache=cache,
                meter=display.meter,
            ):
                results.append(result)
                for line in _lines(result):
                    display.print(line)
        except KeyboardInterrupt:
            display.pause()
            print(
                f"\nstopped; {len(results)} of {counted(len(planned), 'job')} are done, the same "
                "command trains the others",
                file=sys.stderr,
            )
            raise SystemExit(STOPPED) from None
    print(_total(results, target))
    if any(result.failure for result in results):
        raise typer.Exit(1)


def _lines(result: JobResult) -> list[str]:
    """What has become of a job, and what the user must know of its rows."""
    if result.failure:
        return [f"{result.name}: failed: {result.failure}"]
    if not result.is_new:
        return [f"{result.name}: trained before, loss {result.loss:.3f}: {result.path}"]
    parts = (
        counted(result.steps, "step"),
        counted(result.tokens, "token"),
        f"loss {result.losses[0]:.3f} to {result.losses[-1]:.3f}",
        duration(result.seconds),
    )
    said = [f"{result.name}: {line}" for line in notices(result.notices)]
    return [f"{result.name}: {', '.join(parts)}: {result.path}", *said]


def _total(results: Sequence[JobResult], target: Path) -> str:
    new = [result for result in results if result.is_new and not result.failure]
    failed = sum(result.failure is not None for result in results)
    said = f"{counted(len(new), 'adapter')} trained in {duration(sum(r.seconds for r in new))}"
    if before := len(results) - len(new) - failed:
        said += f", {before} trained before"
    if failed:
        said += f", {failed} failed"
    return f"{said}; results: {target / 'summary.json'}"
