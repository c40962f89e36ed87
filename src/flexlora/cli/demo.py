"""The demonstration: mixed ranks against rank 8 for every client, offline, in a few minutes."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flexlora.cli.options import alone_in, refuse_file
from flexlora.cli.outputs import refuse_parts_of_runs
from flexlora.cli.run import run_and_report, stoppable

if TYPE_CHECKING:
    from rich.console import Console

    from flexlora.cli.progress import Display
    from flexlora.config import Experiment
    from flexlora.journal import Event

ARMS = {
    "mixed ranks 8-64": {
        "types": {
            f"rank{rank}": {"attention": rank, "feed_forward": rank} for rank in (8, 16, 32, 64)
        },
        "distribution": {"rank8": 0.25, "rank16": 0.25, "rank32": 0.25, "rank64": 0.25},
    },
    "rank 8 everywhere": {"rank": 8},
}
"""The two federations compared, which differ in their ranks only."""


def demo(
    folder: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="DIR", help="The folder of the two runs; default: runs/demo-TIME."
        ),
    ] = None,
) -> None:
    """Compare mixed ranks with rank 8 everywhere on a small model, offline.

    With the folder of an interrupted demonstration it goes on where that one stopped.
    """
    from flexlora.cli.progress import Display

    target = folder or Path("runs") / f"demo-{datetime.now():%Y%m%d-%H%M%S}"
    refuse_file(target, "--out")
    refuse_parts_of_runs(target, "--out")
    events_by_arm: dict[str, list[Event]] = {}
    with Display() as display, stoppable(target, f"flexlora demo --out {shlex.quote(str(target))}"):
        for arm in ARMS:
            display.print()
            display.print(arm, "bold")
            events_by_arm[arm] = _events(arm, target, display, is_first=not events_by_arm)
    _print_outcome(display.console, target, events_by_arm)


def _events(arm: str, target: Path, display: Display, is_first: bool) -> list[Event]:
    """The journal of one arm, after what is missing of it was run."""
    from flexlora.federation import checkpoint
    from flexlora.journal import Record

    place = _folder(target, arm)
    with alone_in(place, "--out"):
        if any(Record(place).events("finish")):
            display.print("finished before")
        else:
            settings = experiment(arm, str(place), evaluate_base=is_first)
            run_and_report(settings, place, display, resume=checkpoint.is_begun(place))
    return list(Record(place).events())


def experiment(arm: str, folder: str, evaluate_base: bool) -> Experiment:
    """The federation of one arm, with one family of procedural tasks for each client."""
    from flexlora.federation import compose
    from flexlora.model import smollm2

    content: dict[str, Any] = {
        "seed": 3,
        "model": {"name": smollm2.NAME},
        "data": {"format": "procedural", "examples": 60, "unseen_clients": 5, "max_tokens": 256},
        "ranks": ARMS[arm],
        "method": {"name": "flexlora"},
        "training": {
            "learning_rate": 2e-3,
            "schedule": "constant",
            "batch_examples": 4,
            "max_steps": 2,
            "pack_tokens": 512,
        },
        "federation": {"rounds": 3, "cohort": 6},
        "evaluation": {
            "base": evaluate_base,
            "truncated": False,
            "seen_clients": 30,
            "unseen_clients": 5,
            "rows_per_client": 2,
            "max_new_tokens": 16,
            "max_prompt_tokens": 256,
        },
        "run": {"folder": folder},
    }
    return compose.parse(content, "the demo's config")


def scores(events: Sequence[Event], adapter: str, seen: bool) -> dict[str, float]:
    """The mean scores of one adapter's last evaluation, on the seen or the unseen clients."""
    from flexlora.journal import mean_scores

    last = [e for e in events if e["event"] == "evaluation" and e["adapter"] == adapter][-1]
    return mean_scores([row for row in last["clients"] if row["seen"] is seen])


def _folder(target: Path, arm: str) -> Path:
    return target / arm.replace(" ", "-")


def _print_outcome(console: Console, target: Path, events_by_arm: dict[str, list[Event]]) -> None:
    from flexlora.reporting import page

    console.print()
    _print_table(console, events_by_arm)
    for arm, events in events_by_arm.items():
        console.print(f"{arm}:", style="bold")
        console.print(f"  adapter: {events[-1]['adapter']}", soft_wrap=True)
        console.print(f"  report:  {_folder(target, arm) / page.PAGE}", soft_wrap=True)


def _print_table(console: Console, events_by_arm: dict[str, list[Event]]) -> None:
    from rich.table import Table

    first = next(iter(events_by_arm.values()))
    for seen, title in ((True, "Clients that trained"), (False, "Held-out clients")):
        table = Table(title=f"{title} (procedural tasks, one family per client)")
        table.add_column("")
        for heading in ("Rouge-L", "exact match", "loss"):
            table.add_column(heading, justify="right", no_wrap=True)
        table.add_row("before training", *_cells(first, "base", seen))
        for arm, events in events_by_arm.items():
            table.add_row(arm, *_cells(events, "global", seen))
        console.print(table)


def _cells(events: list[Event], adapter: str, seen: bool) -> list[str]:
    mean = scores(events, adapter, seen)
    return [f"{mean['rouge_l']:.1f}", f"{mean['exact_match']:.1f} %", f"{mean['loss']:.3f}"]
