"""The commands that look at a run: a live status page, and the report."""

from __future__ import annotations

from typing import Annotated

import typer

from flexlora.cli.options import RunFolder
from flexlora.errors import ConfigError


def report(folder: RunFolder) -> None:
    """Regenerate report.html from a run's metrics.jsonl."""
    from flexlora.reporting import page

    print(page.write(folder))


def watch(
    folder: RunFolder,
    listen: Annotated[
        str,
        typer.Option(
            metavar="HOST:PORT",
            help="Address to listen on; 0.0.0.0:PORT exposes it to other machines.",
        ),
    ] = "127.0.0.1:8800",
) -> None:
    """Serve a read-only status page of a run, while it runs or afterwards."""
    from flexlora.journal import JOURNAL
    from flexlora.reporting import watch as status_page

    if not any((folder / name).exists() for name in (JOURNAL, "config.json")):
        raise ConfigError(f"There is no run in {folder}: it has no {JOURNAL} and no config.json.")
    status_page.serve(folder, *status_page.address(listen))
