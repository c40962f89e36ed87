"""A comparison as a page: its tables and figures by section."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from flexlora.federation import FILES
from flexlora.reporting import html
from flexlora.reporting import sections as report_sections
from flexlora.reporting.comparison import curves, texts
from flexlora.reporting.comparison.cells import clients, reproduce, runs
from flexlora.reporting.comparison.numbers import DIGITS
from flexlora.reporting.comparison.texts import Listing
from flexlora.reporting.comparison.values import (
    Comparison,
    Series,
    Value,
    curve,
    highest_block,
    score,
    worst_client,
)
from flexlora.reporting.comparison.verdict import verdict
from flexlora.reporting.document import (
    Details,
    Figure,
    Figures,
    Header,
    Link,
    Paragraph,
    Part,
    Section,
    Table,
    grid,
    missing,
)

LOSS_UNIT = "nats per token"
SCORES = (("loss", "Loss", LOSS_UNIT), ("rouge_l", "Rouge-L", "%"))
"""The metrics that are drawn: key, name, unit."""


def render(
    comparison: Comparison, name: str = "", reports: Mapping[tuple[str, int], str] | None = None
) -> str:
    """The page of the comparison in the folder called ``name``. Equal values give equal text.

    ``reports`` are the paths of the runs' reports by method and seed, relative to the page.
    """
    scores, *listings = texts.listings(comparison)
    energy = [listing for listing in listings if listing.title.startswith("Energy")]
    others = [Section(one.title, _parts(one)) for one in listings if one not in energy]
    return html.render_document(
        title=_title(name),
        header=_header(comparison, name),
        sections=[
            Section(scores.title, _parts(scores, marked=comparison.best is not None)),
            *_drawn(comparison),
            clients(comparison),
            *others,
            _spectrum(comparison, energy),
            runs(comparison, reports or {}),
            reproduce(comparison),
        ],
    )


def _title(name: str) -> str:
    return f"{name} — flexlora comparison" if name else "flexlora comparison"


def _header(comparison: Comparison, name: str) -> Header:
    first, *notes = verdict(comparison)
    facts: dict[str, str | Link] = dict(texts.facts(comparison))
    measured = [run for row in comparison.rows for run in row.runs]
    subtitle = [texts.title(comparison)]
    if measured:
        # Variants may differ in them.
        local = dict.fromkeys(report_sections.local_training(run.facts) for run in measured)
        rates = dict.fromkeys(report_sections.learning_rate(run.facts) for run in measured)
        facts["Local training per round"] = " or ".join(local)
        facts["Learning rate"] = " or ".join(rates)
        dates = [run.facts for run in measured if run.facts.started is not None]
        if dates:
            first_run = min(dates, key=lambda facts: facts.started or 0.0)
            subtitle.append(f"started {report_sections.started(first_run)}")
    if name:
        facts |= {"As Markdown": Link(FILES[0], FILES[0]), "As JSON": Link(FILES[1], FILES[1])}
    return Header(
        title=_title(name),
        subtitle=", ".join(subtitle),
        outcome=first,
        notes=[" ".join(notes)] if notes else [],
        facts=[(label, value) for label, value in facts.items() if value],
    )


def _parts(listing: Listing, marked: bool = False) -> list[Part]:
    table = Table(listing.head, listing.lines, listing.words, listing.spans, marked, sortable=True)
    parts: list[Part] = [Paragraph(listing.note), table]
    return [Details(listing.title, parts)] if listing.long else parts


def _drawn(comparison: Comparison) -> list[Section]:
    """The scores after the last round, what they cost in bytes, then everything by round."""
    if comparison.best is None:
        return [Section("Learning", [missing("No run is complete: nothing is drawn.")])]
    glance, quality, learning = (
        _at_a_glance(comparison),
        _quality(comparison),
        _learning(comparison),
    )
    return [glance, quality, learning]


def _at_a_glance(comparison: Comparison) -> Section:
    """The values after the last round as rankings, and the differences by seed."""
    group, best = comparison.group, comparison.best
    where = f"loss on {group} clients" if group else "training loss"
    drawn, parts = list[Figure](), list[Part]()

    def ranked(value: Value, name: str, unit: str, digits: int) -> None:
        spreads = [s for row in comparison.rows if (s := row.spread(value))]
        if not spreads:
            return
        if len(spreads) > 1 and len({v for s in spreads for v in s.values}) == 1:
            same = f"{spreads[0].mean:.{digits}f}"
            parts.append(
                Paragraph(f"{name} is {same} {unit} for all methods and seeds; not drawn.")
            )
            return
        plot = curves.ranking(comparison, value, f"{name} ({unit})", digits)
        drawn.append(Figure(name, plot, _ranking_caption(comparison)))

    ranked(comparison.loss, where[0].upper() + where[1:], LOSS_UNIT, DIGITS["loss"])
    if best and any(comparison.standing(row) for row in comparison.rows[1:]):
        plot = curves.differences(comparison, f"Behind {best.method} ({LOSS_UNIT})")
        drawn.append(
            Figure(f"Behind {best.method} in {where}", plot, _difference_caption(comparison))
        )
    if group:
        ranked(score(group, "rouge_l"), f"Rouge-L on {group} clients", "%", DIGITS["rouge_l"])
        ranked(worst_client(group), f"Loss of the worst {group} client", LOSS_UNIT, DIGITS["loss"])
    return Section("At a glance", [*parts, *grid(drawn)])


def _quality(comparison: Comparison) -> Section:
    """The loss against the bytes that it took, at the end and on the way."""
    group = comparison.group
    name = f"Loss on {group} clients" if group else "Training loss"
    y_title = f"{name} ({LOSS_UNIT})"
    if not any(run.bytes_so_far for row in comparison.rows for run in row.runs):
        return Section("Quality against bytes", [missing("No run counted its bytes.")])
    seeds = " Small points are single seeds." if len(comparison.seeds) > 1 else ""
    drawn = [
        Figure(
            f"{name} against all bytes",
            curves.quality_by_bytes(comparison, y_title, DIGITS["loss"]),
            f"After the last round. Lower and further to the left is better.{seeds}",
        )
    ]
    series: Series = curve(group, "loss") if group else (lambda run: run.training)
    if any(len(row.by_round(series)) > 2 for row in comparison.rows):
        drawn.append(
            Figure(
                f"{name} against the bytes sent so far",
                curves.by_bytes(comparison, series, y_title, DIGITS["loss"]),
                "Each point is an evaluation, means over seeds. Bytes are of all clients together, "
                "up and down.",
            )
        )
    wide = len(comparison.rows) > curves.FEW
    return Section("Quality against bytes", [Figures(drawn, wide=True)] if wide else grid(drawn))


def _learning(comparison: Comparison) -> Section:
    group = comparison.group
    by_round = [_by_round(comparison, lambda run: run.training, "Training loss", LOSS_UNIT, 3)]
    for key, name, unit in SCORES if group else ():
        where, series = f"{name} on {group} clients", curve(str(group), key)
        values = {s.mean for row in comparison.rows for s in row.by_round(series).values()}
        if len(values) > 1:
            by_round.append(_by_round(comparison, series, where, unit, DIGITS[key]))
    lines = "Each line is a method" + (
        ": the thick one its mean over seeds, the thin ones its seeds."
        if len(comparison.seeds) > 1
        else "."
    )
    click = "Click a name in a legend to hide it, double-click it to show it alone."
    parts: list[Part] = [Paragraph(lines), Paragraph(click, pointer=True)]
    if group is None:
        parts.append(missing("Nothing was evaluated, so the training loss decides."))
    return Section("By round", [*parts, Figures(by_round, wide=True)])


def _ranking_caption(comparison: Comparison) -> str:
    if len(comparison.seeds) == 1:
        return "After the last round, of one seed."
    return (
        "After the last round: mean, standard deviation and each seed (grey). The band is the mean "
        "of the first method and its standard deviation to either side."
    )


def _difference_caption(comparison: Comparison) -> str:
    if len(comparison.seeds) == 1:
        return "After the last round, of one seed; the dashed line is no difference."
    return (
        "Differences between runs of the same seed (grey), their mean, and its 95 % interval "
        "(Student's t), which may reach beyond the figure. Where it contains the dashed line, the "
        "seeds do not show a difference."
    )


def _by_round(comparison: Comparison, series: Series, name: str, unit: str, digits: int) -> Figure:
    plot = curves.by_round(comparison, series, f"{name} ({unit})", digits)
    return Figure(f"{name} by round", plot, "")


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
