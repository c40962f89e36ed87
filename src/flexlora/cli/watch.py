"""The commands that look at a run: a live status page, and the report."""

from __future__ import annotations

from typing import Annotated

import typer

from flexlora.cli.options import RunFolder, run_folder


def report(folder: RunFolder = None) -> None:
    """Regenerate report.html from a run's metrics.jsonl."""
    folder = run_folder(folder, "report")
    from flexlora.reporting import page

    print(page.write(folder))


def watch(
    folder: RunFolder = None,
    listen: Annotated[
        str,
        typer.Option(
            metavar="HOST:PORT",
            help="Address to listen on; 0.0.0.0:PORT exposes it to other machines.",
        ),
    ] = "127.0.0.1:8800",
) -> None:
    """Serve a read-only status page of a run, while it runs or afterwards."""
    folder = run_folder(folder, "watch")
    from flexlora.reporting import watch as status_page

    status_page.serve(folder, *status_page.address(listen))
