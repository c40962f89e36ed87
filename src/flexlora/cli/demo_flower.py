"""The demonstration of real clients, compared with a simulation."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from flexlora.cli.options import refuse_file
from flexlora.cli.outputs import refuse_parts_of_runs
from flexlora.errors import ConfigError

MOST_DIFFERENCE = 1e-6
"""The largest relative difference between the products of the demonstration's two adapters."""


def show_demo(
    folder: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Folder for the two runs.")
    ] = None,
) -> None:
    """Train with three real clients of ranks 4, 16 and 64, and compare with a simulation."""
    from flexlora.deployment import demo

    target = folder or Path("runs") / f"flower-{datetime.now():%Y%m%d-%H%M%S}"
    if target.is_dir():
        raise ConfigError(f"{target} exists already; give --out the name of a new folder.")
    refuse_file(target, "--out")
    refuse_parts_of_runs(target, "--out")
    comparison = demo.show(target)
    for name, seconds in zip(("real", "simulated"), comparison.rounds_seconds, strict=True):
        print(f"{name} rounds, seconds: {', '.join(f'{s:.1f}' for s in seconds)}")
    print(f"adapter: {comparison.adapter}")
    print(f"relative difference from the simulation: {comparison.difference:.2g}")
    if comparison.difference > MOST_DIFFERENCE:
        raise ConfigError(f"The two adapters differ by more than {MOST_DIFFERENCE}.")
