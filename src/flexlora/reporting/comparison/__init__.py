"""Several methods side by side: the journals of a comparison's cells as text, JSON and a page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from plotly.offline import get_plotlyjs
from rich.table import Table

from flexlora.federation import FILES, Outcome
from flexlora.reporting import page
from flexlora.reporting.comparison import curves, numbers, texts
from flexlora.reporting.comparison.numbers import DIGITS
from flexlora.reporting.comparison.texts import Listing
from flexlora.reporting.comparison.values import (
    Comparison,
    Series,
    compared,
    curve,
    groups_of,
    highest_block,
    score,
)
from flexlora.reporting.comparison.verdict import verdict
from flexlora.storage.files import write_atomically

STYLE = """
.best tbody tr:first-child td { font-weight: 700; }
.wide figure { margin: 0 0 2em; }
.name { min-width: 0; max-width: 44em; }
td.name { overflow-wrap: break-word; }
"""
LOSS_UNIT = "nats per token"
SCORES = (("loss", "Loss", LOSS_UNIT), ("rouge_l", "Rouge-L", "%"))
"""The metrics that are drawn: key, name, unit."""


def write(folder: Path, outcomes: Sequence[Outcome]) -> Comparison:
    """Write the comparison of these cells into its folder as Markdown, JSON and HTML.

    The page takes about 5 MB, nearly all of it plotly's JavaScript; it needs no network.
    """
    found = compared(outcomes)
    folder.mkdir(parents=True, exist_ok=True)
    data = json.dumps(numbers.content(found, outcomes), indent=1, allow_nan=False)
    for name, text in zip(FILES, (texts.markdown(found), f"{data}\n", render(found)), strict=True):
        write_atomically(folder / name, text.encode(errors="replace"))
    return found


def printed(comparison: Comparison) -> list[Table | str]:
    """What a terminal shows of it: the scores that decide, who is best, what did not finish."""
    listing = texts.scores(comparison, groups_of(comparison)[:1])
    table = Table(title=texts.title(comparison))
    for place, name in enumerate(listing.head):
        table.add_column(name, justify="left" if place in listing.names else "right")
    for line in listing.lines:
        table.add_row(*line)
    states = [f"{row.method}: {row.state}" for row in comparison.rows if row.state]
    return [table, *verdict(comparison), *states]


def render(comparison: Comparison) -> str:
    """The page of a comparison. Equal comparisons give equal text."""
    tables = texts.listings(comparison)
    scores, rest = tables[0], tables[1:]
    energy = [listing for listing in rest if listing.title.startswith("Energy")]
    body = "".join(
        (
            _header(comparison),
            page._section(scores.title, _listing(scores, marked=comparison.best is not None)),
            _drawn(comparison),
            *(page._section(one.title, _listing(one)) for one in rest if one not in energy),
            _spectrum(comparison, energy),
        )
    )
    script = f"<script>{get_plotlyjs()}</script>" if "<figure>" in body else ""
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">{page.POLICY}'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{page._text(texts.title(comparison))}</title>"
        f"<style>{page.STYLE}{STYLE}</style>{script}</head>\n"
        f"<body><main>{body}</main></body></html>\n"
    )


def _header(comparison: Comparison) -> str:
    first, *more = verdict(comparison)
    facts = "".join(
        f"<div><dt>{page._text(name)}</dt><dd>{page._text(value)}</dd></div>"
        for name, value in texts.facts(comparison).items()
        if value
    )
    return (
        f"<header><h1>{page._text(texts.title(comparison))}</h1>"
        f'<p class="outcome">{page._text(first)}</p><p>{page._text(" ".join(more))}</p>'
        f"<dl>{facts}</dl></header>"
    )


def _listing(listing: Listing, marked: bool = False) -> str:
    table = page._table(listing.head, listing.lines, listing.names, listing.spans)
    if marked:
        table = f'<div class="best">{table}</div>'
    text = f"<p>{page._text(listing.note)}</p>{table}"
    return page._details(listing.title, text) if listing.long else text


def _drawn(comparison: Comparison) -> str:
    """The scores at a glance, then everything round by round."""
    if comparison.best is None:
        return page._section("Learning", page._absent("No cell is finished: nothing is drawn."))
    group, ranked = comparison.group, []
    by_round = [_by_round(comparison, lambda run: run.training, "Training loss", LOSS_UNIT, 3)]
    if group is None:
        by_round.append(page._absent("Nothing was evaluated, so the training loss decides."))
    for key, name, unit in SCORES if group else ():
        digits, where = DIGITS[key], f"{name} on {group} clients"
        caption = (
            f"{where} after the last round; the band is the mean of {comparison.best.method} and "
            "its standard deviation to either side."
        )
        figure = curves.ranking(comparison, score(str(group), key), f"{name} ({unit})", digits)
        ranked.append(page._figure(figure, caption))
        series = curve(str(group), key)
        by_round.append(_by_round(comparison, series, where, unit, digits))
    glance = page._section("At a glance", page._grid(ranked)) if ranked else ""
    return glance + page._section("By round", f'<div class="wide">{"".join(by_round)}</div>')


def _by_round(comparison: Comparison, series: Series, name: str, unit: str, digits: int) -> str:
    figure = curves.by_round(comparison, series, f"{name} ({unit})", digits)
    several = len(comparison.seeds) > 1
    lines = "The thick line is the mean over seeds, each thin one a seed. " if several else ""
    caption = f"{name} by round. {lines}A double click on a name shows that method alone."
    return page._figure(figure, caption)


def _spectrum(comparison: Comparison, energy: Sequence[Listing]) -> str:
    """The energy by block of ranks, where there is more than one."""
    if not energy:
        absent = "There is one rank alone, or no spectrum was recorded: no blocks to compare."
        return page._section("Energy by rank", page._absent(absent))
    name = "Energy in the highest block of ranks that clients have"
    drawn = _by_round(comparison, highest_block, name, "%", 2)
    body = "".join(map(_listing, energy))
    return page._section("Energy by rank", f'<div class="wide">{drawn}</div>{body}')
