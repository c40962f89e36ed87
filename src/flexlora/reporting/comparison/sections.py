"""A comparison as a page: its tables and figures by section."""

from __future__ import annotations

from collections.abc import Sequence

from flexlora.reporting import html
from flexlora.reporting.comparison import curves, texts
from flexlora.reporting.comparison.numbers import DIGITS
from flexlora.reporting.comparison.texts import Listing
from flexlora.reporting.comparison.values import Comparison, Series, curve, highest_block, score
from flexlora.reporting.comparison.verdict import verdict
from flexlora.reporting.document import (
    Details,
    Figure,
    Figures,
    Header,
    Paragraph,
    Part,
    Section,
    Table,
    missing,
)

LOSS_UNIT = "nats per token"
SCORES = (("loss", "Loss", LOSS_UNIT), ("rouge_l", "Rouge-L", "%"))
"""The metrics that are drawn: key, name, unit."""


def render(comparison: Comparison) -> str:
    """The page of a comparison. Equal comparisons give equal text."""
    scores, *listings = texts.listings(comparison)
    energy = [listing for listing in listings if listing.title.startswith("Energy")]
    return html.render_document(
        title=texts.title(comparison),
        header=_header(comparison),
        sections=[
            Section(scores.title, _parts(scores, marked=comparison.best is not None)),
            *_drawn(comparison),
            *(Section(one.title, _parts(one)) for one in listings if one not in energy),
            _spectrum(comparison, energy),
        ],
    )


def _header(comparison: Comparison) -> Header:
    first, *notes = verdict(comparison)
    facts = [(label, text) for label, text in texts.facts(comparison).items() if text]
    return Header(texts.title(comparison), "", first, [" ".join(notes)] if notes else [], facts)


def _parts(listing: Listing, marked: bool = False) -> list[Part]:
    table = Table(listing.head, listing.lines, listing.words, listing.spans, marked)
    parts: list[Part] = [Paragraph(listing.note), table]
    return [Details(listing.title, parts)] if listing.long else parts


def _drawn(comparison: Comparison) -> list[Section]:
    """The scores after the last round, then everything round by round."""
    best, group = comparison.best, comparison.group
    if best is None:
        return [Section("Learning", [missing("No run is complete: nothing is drawn.")])]
    ranked = []
    by_round = [_by_round(comparison, lambda run: run.training, "Training loss", LOSS_UNIT, 3)]
    for key, name, unit in SCORES if group else ():
        digits, where = DIGITS[key], f"{name} on {group} clients"
        plot = curves.ranking(comparison, score(str(group), key), f"{name} ({unit})", digits)
        ranked.append(Figure(where, plot, _ranking_caption(comparison, where, best.method)))
        by_round.append(_by_round(comparison, curve(str(group), key), where, unit, digits))
    lines = "Each line is a method" + (
        ": the thick one its mean over seeds, the thin ones its seeds."
        if len(comparison.seeds) > 1
        else "."
    )
    parts: list[Part] = [
        Paragraph(f"{lines} Click a name in a legend to hide it, double-click it to isolate it.")
    ]
    if group is None:
        parts.append(missing("Nothing was evaluated, so the training loss decides."))
    glance = [Section("At a glance", [Figures(ranked)])] if ranked else []
    return [*glance, Section("By round", [*parts, Figures(by_round, wide=True)])]


def _ranking_caption(comparison: Comparison, where: str, best: str) -> str:
    if len(comparison.seeds) == 1:
        return f"{where} after the last round, of one seed."
    return (
        f"{where} after the last round: mean, standard deviation and each seed. The band is the "
        f"mean of {best} and its standard deviation to either side."
    )


def _by_round(comparison: Comparison, series: Series, name: str, unit: str, digits: int) -> Figure:
    plot = curves.by_round(comparison, series, f"{name} ({unit})", digits)
    return Figure(name, plot, f"{name} by round.")


def _spectrum(comparison: Comparison, energy: Sequence[Listing]) -> Section:
    """The energy by block of ranks, if there is more than one."""
    if not energy:
        sentence = "There is only one rank, or no spectrum was recorded: no blocks to compare."
        return Section("Energy by rank", [missing(sentence)])
    plot = curves.by_round(comparison, highest_block, "Energy in the block (%)", 2)
    caption = "Share of the energy in the block of ranks that only the largest clients have."
    drawn = Figure("Energy in the highest block of ranks in use", plot, caption)
    tables = [part for listing in energy for part in _parts(listing)]
    return Section("Energy by rank", [Figures([drawn], wide=True), *tables])
