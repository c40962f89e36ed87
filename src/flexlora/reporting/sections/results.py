"""Evaluation results: scores by round and adapter, and by category."""

from __future__ import annotations

from collections.abc import Sequence

from flexlora.journal import NOTHING, Event, counted, number
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
from flexlora.reporting.sections.header import INTERVALS, between
from flexlora.reporting.tables import (
    CategoryRow,
    ClientChange,
    ClientEvaluationRow,
    ClientLossRow,
    EvaluationRow,
    Metric,
)

LONGEST_TABLE = 16
FEW_CATEGORIES = 5
"""Up to this number of categories a table says all, and nothing is drawn."""

MOST_CATEGORIES = 60


def scores(rows: Sequence[EvaluationRow]) -> Section:
    """The scores of all evaluations; of many, the first and the last round are shown first."""
    if not rows:
        return Section("Scores", [missing("No evaluation was recorded, so there are no scores.")])
    parts: list[Part] = [
        Paragraph(
            "Rouge-L and exact match in percent, loss in nats per token. Means are weighted by "
            "examples, the loss by tokens. Unseen clients are held out of training. Round 0 is "
            f"before training. {INTERVALS}"
        )
    ]
    for group in ("unseen", "seen"):
        chosen = [row for row in rows if row.group == group]
        parts += _scores_of(chosen) if chosen else [missing(f"No {group} clients were evaluated.")]
    return Section("Scores", parts)


def client_scores(events: Sequence[Event]) -> list[Section]:
    """The loss on the clients' own held-out rows, by round and by client; nothing without any."""
    rounds, clients = tables.client_evaluation_table(events), tables.client_loss_table(events)
    if not rounds:
        return []
    note = Paragraph(
        "Every client evaluated the global adapter on rows of its own that never train. Losses are "
        "in nats per token. The mean is weighted by tokens; lowest, highest and standard deviation "
        "are over the clients' own means. Round 0 is the base model."
    )
    head = ["Round", "Clients", "Rows", "Mean", "Lowest", "Highest", "Std. dev.", "Worst client"]
    by_round = [
        [
            f"{row.round:,}",
            f"{row.clients:,}" + (f" ({row.missing:,} missing)" if row.missing else ""),
            f"{row.examples:,}",
            *(number(v, 3) for v in (row.loss, row.lowest, row.highest, row.deviation)),
            row.worst or NOTHING,
        ]
        for row in rounds
    ]
    parts: list[Part] = [note, Table(head, by_round, {7}), *grid(_own_rows(rounds, clients))]
    if clients:
        cells = [
            [
                row.client,
                f"{row.examples:,}",
                number(row.before, 3),
                number(row.after, 3),
                NOTHING if row.before is None else f"{row.after - row.before:+.3f}",
            ]
            for row in clients
        ]
        head = ["Client", "Rows", "Before training", "Last", "Change"]
        by_client = Table(head, cells, {0}, sortable=True)
        parts.append(
            Details(f"{counted(len(clients), 'client')}, the highest loss first", [by_client])
        )
    return [Section("Scores on the clients' own rows", parts)]


def _own_rows(
    rounds: Sequence[ClientEvaluationRow], clients: Sequence[ClientLossRow]
) -> list[Figure]:
    """The losses on the clients' own rows by round, and of each client before and after."""
    drawn = []
    if len([row for row in rounds if row.loss is not None]) > 1:
        caption = "Mean weighted by tokens; the band reaches from the best to the worst client."
        drawn.append(Figure("Loss on the clients' own rows", figures.own_losses(rounds), caption))
    changes = [
        ClientChange(row.client, "seen", row.examples, row.before, row.after) for row in clients
    ]
    if len([change for change in changes if change.before is not None]) > 1:
        plot = figures.client_changes(changes, tables.METRICS[-1])
        caption = "Each point is a client. Clients below the line gained by training."
        drawn.append(Figure("Loss of each client before and after training", plot, caption))
    return drawn


def categories(events: Sequence[Event], rows: Sequence[EvaluationRow]) -> Section:
    """The scores by category before and after training, drawn if there are many."""
    metric = tables.main_metric(rows)
    drawn, listed, notes = [], list[Part](), list[Part]()
    for group in ("unseen", "seen"):
        table = tables.category_table(events, group)
        if not table or metric is None:
            continue
        title = f"{metric.title} by category, {group} clients"
        if len(table) <= FEW_CATEGORIES:
            listed += [Paragraph(f"{title} ({metric.unit}):"), _category_table(table)]
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
        plot = figures.categories(chosen, metric)
        drawn.append(Figure(title, plot, "The greatest gain first."))
        summary = f"{counted(len(table), 'category', 'categories')} of {group} clients as a table"
        listed.append(Details(summary, [_category_table(table)]))
    if not drawn and not listed:
        sentence = "There are no scores by category from before and after training."
        return Section("Categories", [missing(sentence)])
    return Section("Categories", [*notes, *grid(drawn), *listed])


def _scores_of(rows: Sequence[EvaluationRow]) -> list[Part]:
    """The scores of one group of clients as a table, which is shortened if it is long."""
    sizes = {(row.clients, row.examples) for row in rows}
    group = f"{rows[0].group.capitalize()} clients"
    if len(sizes) == 1:
        group += f" ({rows[0].clients:,}, n = {counted(rows[0].examples, 'example')})"
    columns = ["Clients", "Examples"] if len(sizes) > 1 else []
    head = ["Round", "Adapter", *columns, *(m.title for m in tables.METRICS)]

    def table(chosen: Sequence[EvaluationRow]) -> Table:
        return Table(head, [_score_cells(row, bool(columns)) for row in chosen], {1})

    if len(rows) <= LONGEST_TABLE:
        return [Paragraph(f"{group}:"), table(rows)]
    ends = [row for row in rows if row.round in (rows[0].round, rows[-1].round)]
    every = Details(f"All {len(rows)} evaluations on {rows[0].group} clients", [table(rows)])
    return [Paragraph(f"{group}, first and last round:"), table(ends), every]


def _score_cells(row: EvaluationRow, with_sizes: bool) -> list[str]:
    sizes = [f"{row.clients:,}", f"{row.examples:,}"] if with_sizes else []
    scores = [_with_interval(row, m) for m in tables.METRICS]
    return [f"{row.round:,}", row.adapter, *sizes, *scores]


def _with_interval(row: EvaluationRow, metric: Metric) -> str:
    score, interval = number(row.score(metric), 2), row.interval(metric)
    digits = 1 if metric.unit == "%" else 2
    if interval is None:
        return score
    # On a narrow page the interval stands on a line of its own.
    return f"{score}\n({between(interval, digits)})"


def _category_table(table: Sequence[CategoryRow]) -> Table:
    head = ["Category", "Examples", "Before", "After", "Gain"]
    cells = [
        [r.category, f"{r.examples:,}", number(r.before, 2), number(r.after, 2), f"{r.gain:+.2f}"]
        for r in table
    ]
    return Table(head, cells, {0}, sortable=True)
