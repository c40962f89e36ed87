"""The demonstration: mixed ranks against rank 8 for every client, offline, in a few minutes."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flexlora.cli.run import run_and_report

if TYPE_CHECKING:
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
    """Compare mixed ranks with rank 8 everywhere on a small model, offline."""
    from rich.console import Console

    from flexlora.reporting import page

    console = Console()
    target = folder or Path("runs") / f"demo-{datetime.now():%Y%m%d-%H%M%S}"
    events_by_arm: dict[str, list[Event]] = {}
    for arm in ARMS:
        console.print(f"\n{arm}", style="bold")
        place = _folder(target, arm)
        settings = experiment(arm, str(place), evaluate_base=not events_by_arm)
        events_by_arm[arm] = run_and_report(settings, place)
    console.print()
    _print_table(console, events_by_arm)
    for arm, events in events_by_arm.items():
        console.print(f"{arm}:", style="bold")
        console.print(f"  adapter: {events[-1]['adapter']}", soft_wrap=True)
        console.print(f"  report:  {_folder(target, arm) / page.PAGE}", soft_wrap=True)


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


def _print_table(console: Any, events_by_arm: dict[str, list[Event]]) -> None:
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
