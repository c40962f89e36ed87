"""Evaluation results: scores by round and adapter, and by category."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from flexlora.journal import Event, counted, number
from flexlora.reporting import figures, tables
from flexlora.reporting.document import (
    Details,
    Figure,
    Paragraph,
    Part,
    Section,
    Table,
    grid,
    missing,
)
from flexlora.reporting.tables import CategoryRow, EvaluationRow

LONGEST_TABLE = 20
MOST_CATEGORIES = 60


def scores(rows: Sequence[EvaluationRow]) -> Section:
    """The scores of all evaluations; of many, the first and the last round are shown first."""
    if not rows:
        return Section("Scores", [missing("No evaluation was recorded, so there are no scores.")])
    by_adapter: dict[tuple[int, str], dict[str, EvaluationRow]] = {}
    for row in rows:
        by_adapter.setdefault((row.round, row.adapter), {})[row.group] = row
    groups = [g for g in ("seen", "unseen") if any(r.group == g for r in rows)]
    lines = {key: _score_cells(key, by_adapter[key], groups) for key in by_adapter}
    parts: list[Part] = [
        Paragraph(
            "Rouge-L and exact match in percent, loss in nats per token. Means are weighted by "
            "examples, the loss by tokens. Unseen clients are held out of training. Round 0 is "
            "before training."
        )
    ]
    parts += [missing(f"No {g} clients were evaluated.") for g in {"seen", "unseen"} - set(groups)]
    head = ["Round", "Adapter", *("Examples", *(m.title for m in tables.METRICS)) * len(groups)]
    spans = [("", 2), *((f"{group.capitalize()} clients", 4) for group in groups)]
    complete = Table(head, list(lines.values()), {1}, spans)
    if len(lines) <= LONGEST_TABLE:
        return Section("Scores", [*parts, complete])
    ends = (rows[0].round, rows[-1].round)
    short = Table(head, [cells for key, cells in lines.items() if key[0] in ends], {1}, spans)
    every = Details(f"All {len(lines)} evaluations", [complete])
    return Section("Scores", [*parts, Paragraph("First and last round:"), short, every])


def categories(events: Sequence[Event], rows: Sequence[EvaluationRow]) -> Section:
    """The scores by category before and after training."""
    metric = tables.main_metric(rows)
    drawn, listed, notes = [], list[Part](), list[Part]()
    for group in ("unseen", "seen"):
        table = tables.category_table(events, group)
        if not table or metric is None:
            continue
        most = MOST_CATEGORIES // 2
        chosen = table if len(table) <= MOST_CATEGORIES else table[:most] + table[-most:]
        if len(chosen) < len(table):
            notes = [
                Paragraph(
                    f"Of many categories the {most} with the greatest and the {most} with the "
                    "smallest gain are drawn; the tables contain all."
                )
            ]
        drawn.append(
            Figure(
                f"{metric.title} by category, {group} clients",
                figures.categories(chosen, metric),
                f"{metric.title} by category on {group} clients, the greatest gain first.",
            )
        )
        listed.append(_category_details(table, group))
    if not drawn:
        sentence = "There are no scores by category from before and after training."
        return Section("Categories", [missing(sentence)])
    return Section("Categories", [*notes, *grid(drawn), *listed])


def _score_cells(
    key: tuple[int, str], by_group: Mapping[str, EvaluationRow], groups: Sequence[str]
) -> list[str]:
    cells = [f"{key[0]:,}", key[1]]
    for group in groups:
        row = by_group.get(group)
        cells.append(f"{row.examples:,}" if row else "–")
        cells += [number(row.score(m) if row else None, 2) for m in tables.METRICS]
    return cells


def _category_details(table: Sequence[CategoryRow], group: str) -> Details:
    head = ["Category", "Examples", "Before", "After", "Gain"]
    cells = [
        [r.category, f"{r.examples:,}", number(r.before, 2), number(r.after, 2), f"{r.gain:+.2f}"]
        for r in table
    ]
    summary = f"{counted(len(table), 'category', 'categories')} of {group} clients as a table"
    return Details(summary, [Table(head, cells, {0})])
