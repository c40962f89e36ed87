"""Several methods side by side: the journals of a comparison's runs as text, JSON and a page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from flexlora.federation import FILES, Outcome
from flexlora.reporting.comparison import numbers, sections, texts
from flexlora.reporting.comparison.sections import render
from flexlora.reporting.comparison.values import Comparison, compared, groups_of
from flexlora.reporting.comparison.verdict import verdict
from flexlora.storage import write_atomically

__all__ = ["Comparison", "compared", "printed", "render", "sections", "verdict", "write"]


def write(folder: Path, outcomes: Sequence[Outcome]) -> Comparison:
    """Write the comparison of these runs into its folder as Markdown, JSON and HTML.

    The page takes about 2 MB, nearly all of it plotly's JavaScript; it needs no network.
    """
    comparison = compared(outcomes)
    folder.mkdir(parents=True, exist_ok=True)
    data = json.dumps(numbers.content(comparison, outcomes), indent=1, allow_nan=False)
    contents = (texts.markdown(comparison), f"{data}\n", render(comparison))
    for name, text in zip(FILES, contents, strict=True):
        write_atomically(folder / name, text.encode(errors="replace"))
    return comparison


def printed(comparison: Comparison) -> list[Table | str]:
    """What a terminal shows of it: the scores that decide, the result, what did not finish."""
    listing = texts.scores(comparison, groups_of(comparison)[:1])
    table = Table(title=texts.title(comparison))
    for place, name in enumerate(listing.head):
        table.add_column(name, justify="left" if place in listing.words else "right")
    for line in listing.lines:
        table.add_row(*line)
    return [table, *verdict(comparison), *texts.unfinished(comparison)]
