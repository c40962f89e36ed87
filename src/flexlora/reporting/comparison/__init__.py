"""Several methods side by side: the journals of a comparison's runs as text, JSON and a page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from flexlora.federation import FILES, Outcome
from flexlora.reporting import page
from flexlora.reporting.comparison import numbers, sections, texts
from flexlora.reporting.comparison.sections import render
from flexlora.reporting.comparison.values import Comparison, compared, groups_of
from flexlora.reporting.comparison.verdict import verdict
from flexlora.storage import write_atomically

__all__ = ["Comparison", "compared", "printed", "render", "reports", "sections", "verdict", "write"]


def write(folder: Path, outcomes: Sequence[Outcome]) -> Comparison:
    """Write the comparison of these runs into its folder as Markdown, JSON and HTML.

    Runs that are complete and have no report get one, to which the page links. The page takes
    about 2 MB, nearly all of it plotly's JavaScript; it needs no network.
    """
    comparison = compared(outcomes)
    folder.mkdir(parents=True, exist_ok=True)
    data = json.dumps(numbers.content(comparison, outcomes), indent=1, allow_nan=False)
    shown = render(comparison, folder.resolve().name, reports(folder, outcomes))
    contents = (texts.markdown(comparison), f"{data}\n", shown)
    for name, text in zip(FILES, contents, strict=True):
        write_atomically(folder / name, text.encode(errors="replace"))
    return comparison


def reports(folder: Path, outcomes: Sequence[Outcome]) -> dict[tuple[str, int], str]:
    """The report of every complete run, by method and seed; those that are missing are written."""
    paths = {}
    for cell in (outcome.cell for outcome in outcomes if outcome.state == "finished"):
        path = cell.folder / page.PAGE
        if not path.exists():
            page.write(cell.folder)
        if path.resolve().is_relative_to(folder.resolve()):
            relative = path.resolve().relative_to(folder.resolve())
            paths[cell.name, cell.seed] = relative.as_posix()
    return paths


def printed(comparison: Comparison) -> list[Table | str]:
    """What a terminal shows of it: the scores that decide, the result, what did not finish."""
    listing = texts.scores(comparison, groups_of(comparison)[:1])
    table = Table(title=texts.title(comparison))
    for place, name in enumerate(listing.head):
        table.add_column(name, justify="left" if place in listing.words else "right")
    for line in listing.lines:
        table.add_row(*line)
    return [table, *verdict(comparison), *texts.unfinished(comparison)]
