"""What training did: losses by round, ranks and truncation, singular values."""

from __future__ import annotations

from collections.abc import Sequence

from flexlora.journal import NOTHING, Event, number
from flexlora.reporting import figures, tables
from flexlora.reporting.document import (
    Details,
    Figure,
    Figures,
    Paragraph,
    Part,
    Section,
    Table,
    grid,
    missing,
)
from flexlora.reporting.tables import (
    EvaluationRow,
    KeptRow,
    Metric,
    RankTypeRow,
    SpectrumRow,
)

MOST_LEVELS = 8
"""Of more rank levels the energy kept is drawn, else it is a table."""


def learning(events: Sequence[Event], rows: Sequence[EvaluationRow]) -> Section:
    """The training loss and the scores of the global adapter by round."""
    drawn, parts = [], list[Part]()
    training = [r for r in tables.training_table(events) if r.loss is not None]
    if training:
        drawn.append(
            Figure(
                "Training loss",
                figures.training_loss(training),
                "Mean over the tokens trained on, of all clients of the round and of each rank "
                "type. Jumps are to be expected: each round trains other clients (its cohort), so "
                "the loss of a rank type also changes with the clients that were drawn.",
            )
        )
    else:
        parts.append(missing("No round was completed: there is no training loss."))
    curve = tables.trajectory(rows)
    for metric in tables.METRICS:
        scores = {score for r in curve if (score := r.score(metric)) is not None}
        measured = [r for r in curve if r.score(metric) is not None]
        title = f"{metric.title} of the global adapter"
        if len(scores) == 1 and len(measured) > 1:
            unit = " %" if metric.unit == "%" else f" {metric.unit}"
            parts.append(
                Paragraph(f"{title} is {scores.pop():.2f}{unit} in every evaluation; not drawn.")
            )
        elif measured:
            caption = f"{title}; round 0 is before training. Whiskers: 95 % intervals."
            plot = figures.learning_curve(measured, metric)
            drawn.append(Figure(title, plot, caption))
    if not curve:
        parts.append(missing("The global adapter was not evaluated."))
    return Section("Learning", [*parts, *grid(drawn)])


def ranks(events: Sequence[Event], rows: Sequence[EvaluationRow]) -> Section:
    """The rank types, and what truncation to a rank costs."""
    title = "Ranks and truncation"
    types, kept = tables.rank_type_table(events), tables.kept_table(events)
    if not types and not kept:
        return Section(title, [missing("The rank types were not recorded.")])
    parts = list[Part]()
    if types:
        parts += _rank_types(types, tables.truncated_table(rows))
    if kept:
        parts.append(
            Paragraph(
                "Energy, the share of the squared singular values of the global update after "
                f"round {kept[0].round}, that is kept when it is truncated to a rank: in percent, "
                "over modules."
            )
        )
        parts += _kept(kept)
    return Section(title, parts)


def spectrum(events: Sequence[Event]) -> Section:
    """The energy by block of ranks, and the singular values of a few modules."""
    energy, values = tables.energy_table(events), tables.spectrum_table(events)
    if not energy and not values:
        sentence = "No spectrum of the global update was recorded."
        return Section("Spectrum", [missing(sentence)])
    parts = list[Part]()
    if energy:
        caption = (
            "Energy (the sum of the squared singular values) of the global update by block of "
            "ranks, mean over modules. What lies beyond the largest rank in use reaches no client."
        )
        plot = figures.energy(energy)
        parts.append(Figures([Figure("Energy by block of ranks", plot, caption)]))
    modules = list(dict.fromkeys(r.module for r in values))
    if modules:
        drawn = [_singular_values(values, module) for module in modules]
        reading = Paragraph(
            "How to read them: a line is one round, its values descend. A steep descent means that "
            "few ranks hold the update, and that truncating it to a small rank loses little; a "
            "flat line means that it uses all of its ranks. The modules are a sample, evenly "
            "spread over those that are adapted."
        )
        summary = f"Singular values of {len(modules)} of the adapted modules"
        parts.append(Details(summary, [reading, *grid(drawn)]))
    return Section("Spectrum", parts)


def _rank_types(types: Sequence[RankTypeRow], cut: Sequence[EvaluationRow]) -> list[Part]:
    """The rank types as a table, with the scores of the adapter that is truncated to them."""
    measured = [
        (group, metric)
        for group in ("unseen", "seen")
        for metric in tables.METRICS
        if any(r.group == group and r.score(metric) is not None for r in cut)
    ]
    head = ["Rank type", "Ranks", "Clients", "Parameters"]
    rows = [
        [
            row.name,
            row.ranks.removeprefix("rank ") or NOTHING,
            f"{row.clients:,}",
            NOTHING if row.trainable is None else f"{row.trainable:,}",
            *_truncated(row.name, cut, measured),
        ]
        for row in types
    ]
    note = "Parameters are those that one client trains."
    spans = [("", len(head))]
    if measured:
        rows.append(["(not truncated)", *[NOTHING] * 3, *_truncated("global", cut, measured)])
        note += (
            " The scores are of the global adapter truncated to the ranks of each type, after "
            f"round {cut[0].round}."
        )
        for group in dict.fromkeys(group for group, _ in measured):
            metrics = [m for g, m in measured if g == group]
            spans.append((f"{group.capitalize()} clients", len(metrics)))
            head += [m.title for m in metrics]
    return [Paragraph(note), Table(head, rows, {0, 1}, spans if measured else ())]


def _truncated(
    adapter: str, cut: Sequence[EvaluationRow], measured: Sequence[tuple[str, Metric]]
) -> list[str]:
    by_group = {r.group: r for r in cut if r.adapter == adapter}
    return [
        number(by_group[group].score(metric) if group in by_group else None, 2)
        for group, metric in measured
    ]


def _kept(rows: Sequence[KeptRow]) -> list[Part]:
    if len(rows) > MOST_LEVELS:
        caption = "The band reaches from the lowest to the highest module."
        return [Figures([Figure("Energy kept by truncation", figures.kept(rows), caption)])]
    cells = [[f"{r.rank:,}", *(f"{v:.1f}" for v in (r.mean, r.lowest, r.highest))] for r in rows]
    return [Table(["Truncated to rank", "Mean", "Lowest", "Highest"], cells, ())]


def _singular_values(values: Sequence[SpectrumRow], module: str) -> Figure:
    rows = [r for r in values if r.module == module]
    return Figure(module, figures.spectrum(rows), f"Singular values of {module}, by round.")
