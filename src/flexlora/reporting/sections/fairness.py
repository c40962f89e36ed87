"""How the clients differ: the distribution of their scores, the worst, and sample answers."""

from __future__ import annotations

from collections.abc import Sequence

from flexlora.journal import ANSWERS, NOTHING, counted, number
from flexlora.reporting import figures, tables
from flexlora.reporting.document import (
    Details,
    Figure,
    Paragraph,
    Part,
    Sample,
    Section,
    Table,
    grid,
    missing,
)
from flexlora.reporting.names import shortened
from flexlora.reporting.tables import (
    ClientChange,
    ClientSpread,
    EvaluationRow,
    Metric,
    SampleRow,
)

MOST_SAMPLES = 6
LONGEST_TEXT = 1500
_MOST_NAMED = 5


def fairness(rows: Sequence[EvaluationRow]) -> Section:
    """The distribution of scores over clients before and after training, and the worst client."""
    title = "Scores by client"
    metric = tables.distinguishing_metric(rows)
    if metric is None:
        return Section(title, [missing("No scores of several clients were recorded.")])
    spreads, changes = list[ClientSpread](), list[ClientChange]()
    for group in ("unseen", "seen"):
        first, last = tables.before_and_after(rows, group)
        last = last or first
        if last is None:
            continue
        ends = [row for row in (first, last) if row and (row is last or row.round < last.round)]
        spreads += [s for row in ends if (s := tables.client_spread(row, metric))]
        changes += tables.client_changes(first if first is not last else None, last, metric)
    if not spreads:
        return Section(title, [missing("No scores of several clients were recorded.")])
    drawn = [
        Figure(
            f"{metric.title} of each client, sorted",
            figures.sorted_clients(changes, metric),
            "Each point is a client, the worst on the left. The flatter the line, the more alike "
            "the clients are served.",
        )
    ]
    if any(change.before is not None for change in changes):
        better = "above" if metric.more_is_better else "below"
        drawn.append(
            Figure(
                f"{metric.title} of each client before and after training",
                figures.client_changes(changes, metric),
                f"Each point is a client. Clients {better} the line gained by training.",
            )
        )
    summary = f"{metric.title} ({metric.unit}) of {counted(len(changes), 'client')} as a table"
    listing = Details(summary, [_listing(changes)])
    unit = Paragraph(f"{metric.title} ({metric.unit}) by client, each of which counts once:")
    told = Paragraph(_told(spreads, changes, metric))
    return Section(title, [told, unit, _spreads(spreads), *grid(drawn), listing])


def samples(rows: Sequence[SampleRow]) -> Section:
    """A few answers before and after training, good ones and bad ones."""
    chosen = tables.chosen_samples(rows, MOST_SAMPLES)
    if not chosen:
        return Section("Sample answers", [missing("No answers were saved.")])
    summary = f"{len(chosen)} of {counted(len(rows), 'question')} with answers"
    text = (
        f"Answers of the base model and of the global adapter after round {chosen[0].round}, from "
        "the greatest gain in Rouge-L to the greatest loss, evenly spread. All sample answers are "
        f"in {ANSWERS} in the folder of the run."
    )
    parts: list[Part] = [_sample(row) for row in chosen]
    return Section("Sample answers", [Paragraph(text), Details(summary, parts)])


def _told(spreads: Sequence[ClientSpread], changes: Sequence[ClientChange], metric: Metric) -> str:
    """The worst client of each group, and how many clients training made worse."""
    unit = " %" if metric.unit == "%" else f" {metric.unit}"
    sentences = []
    for spread in {s.group: s for s in spreads}.values():
        sentences.append(
            f"The worst {spread.group} client is {shortened(spread.worst_client)}: {metric.title} "
            f"{spread.worst:.2f}{unit} (n = {counted(spread.worst_examples, 'example')}), where "
            f"the mean over {spread.clients:,} clients is {spread.mean:.2f}{unit}."
        )
    compared = [c for c in changes if c.before is not None]
    if compared:
        worse = [c for c in compared if metric.gain(c.before or 0.0, c.after) < 0]
        names = ", ".join(shortened(c.client) for c in worse[:_MOST_NAMED])
        more = len(worse) - _MOST_NAMED
        listed = f" ({names}{f' and {more:,} more' if more > 0 else ''})" if worse else ""
        verb = "is" if len(worse) == 1 else "are"
        sentences.append(
            f"{len(worse):,} of {len(compared):,} clients {verb} worse than before training"
            f"{listed}."
        )
    return " ".join(sentences)


def _spreads(spreads: Sequence[ClientSpread]) -> Table:
    head = ["Clients", "Round", "Number", "Mean", "Std. deviation", "Worst", "Worst tenth"]
    head += ["Median", "Best"]
    rows = [
        [
            s.group,
            f"{s.round:,}",
            f"{s.clients:,}",
            *(
                f"{value:.2f}"
                for value in (s.mean, s.deviation, s.worst, s.worst_tenth, s.median, s.best)
            ),
        ]
        for s in spreads
    ]
    return Table(head, rows, {0})


def _listing(changes: Sequence[ClientChange]) -> Table:
    head = ["Client", "Group", "Examples", "Before", "After", "Change"]
    differences = [None if c.before is None else c.after - c.before for c in changes]
    rows = [
        [
            c.client,
            c.group,
            f"{c.examples:,}",
            number(c.before, 2),
            f"{c.after:.2f}",
            NOTHING if change is None else f"{change:+.2f}",
        ]
        for c, change in zip(changes, differences, strict=True)
    ]
    return Table(head, rows, {0, 1}, sortable=True)


def _sample(row: SampleRow) -> Sample:
    who = ", ".join(part for part in (row.client, row.group, row.category) if part)
    texts = [("Prompt", row.prompt), ("Reference", row.reference)]
    if row.before is not None:
        texts.append((f"Before training{_rouge(row.rouge_before)}", row.before))
    texts.append((f"After round {row.round}{_rouge(row.rouge_after)}", row.after))
    return Sample(who, [(label, _cut(text)) for label, text in texts])


def _rouge(value: float | None) -> str:
    return "" if value is None else f" (Rouge-L {value:.1f} %)"


def _cut(text: str) -> str:
    """The text, shortened in its middle if it is very long; a word for an empty one."""
    if not text.strip():
        return "(empty)"
    if len(text) <= LONGEST_TEXT:
        return text
    half = LONGEST_TEXT // 2
    return f"{text[:half]}\n[… {len(text) - 2 * half:,} characters left out …]\n{text[-half:]}"
