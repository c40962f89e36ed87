"""The single runs of a comparison: a table of them, their clients, and how to repeat them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from flexlora.journal import NOTHING, duration, number, size
from flexlora.reporting import tables
from flexlora.reporting.comparison.values import (
    Comparison,
    Measured,
    Row,
    Value,
    sent,
    text_of,
    worst_client,
)
from flexlora.reporting.document import (
    Code,
    Details,
    Link,
    Paragraph,
    Section,
    Table,
    missing,
)
from flexlora.reporting.tables import ClientSpread

REPORT = "report"
FEW_RUNS = 12
"""Up to this number of runs their table is not folded."""

_WORSE = "Worse off (%)"


def runs(comparison: Comparison, reports: Mapping[tuple[str, int], str]) -> Section:
    """Every complete run with its scores and costs, and a link to its report."""
    measured = [(row, run) for row in comparison.rows for run in row.runs]
    if not measured:
        return Section("Runs", [missing("No run is complete.")])
    group = comparison.group
    head = ["Method", "Seed", "Loss", "Rouge-L", "Worst client", "Bytes", "Time", "Report"]
    rows = [_run_cells(comparison, row, run, reports) for row, run in measured]
    on = f"on {group} clients" if group else "in training"
    note = Paragraph(
        f"Each run by itself, after its last round: loss {on} in nats per token, Rouge-L in "
        "percent, the loss of the worst client, bytes up and down, and the wall-clock time of all "
        "rounds without evaluation."
    )
    table = Table(head, rows, {0, 7}, sortable=True)
    folded = Details(f"{len(rows)} runs", [table])
    return Section("Runs", [note, table if len(rows) <= FEW_RUNS else folded])


def clients(comparison: Comparison) -> Section:
    """How the clients differ under each method: the worst, the spread, and who got worse."""
    group = comparison.group
    values: dict[str, Value] = {}
    if group:
        values = {
            "Worst client": worst_client(group),
            "Worst tenth": lambda run: _part(run, group, "worst_tenth"),
            "Mean over clients": lambda run: _part(run, group, "mean"),
            "Std. deviation": lambda run: _part(run, group, "deviation"),
            _WORSE: lambda run: _worse_off(run, group),
        }
    rows = [
        [
            row.method,
            *(text_of(row.spread(v), 1 if key == _WORSE else 3) for key, v in values.items()),
        ]
        for row in comparison.rows
        if group and row.spread(worst_client(group))
    ]
    if not rows:
        return Section("Scores by client", [missing("No scores of several clients were recorded.")])
    note = Paragraph(
        f"Loss of the {group} clients after the last round in nats per token, every client counted "
        "once; the worst tenth is the mean of that part of the clients, of at least one. Worse off "
        "are clients whose loss is higher than before training, in percent. Mean ± standard "
        "deviation over seeds."
    )
    return Section("Scores by client", [note, Table(["Method", *values], rows, {0}, sortable=True)])


def reproduce(comparison: Comparison) -> Section:
    """The config and the command with which the comparison can be repeated."""
    from flexlora.config import dump  # loads PyTorch, which a page otherwise does not need

    runs = [run for row in comparison.rows for run in row.runs]
    if not runs or not runs[0].facts.config:
        return Section("Reproduce", [missing("The config was not recorded.")])
    config: dict[str, Any] = {
        **runs[0].facts.config,
        "seed": comparison.seeds[0],
        "method": {"name": comparison.rows[0].kind},
    }
    if table := _compare_table(comparison):
        config["compare"] = table
    names = ",".join(dict.fromkeys(row.kind for row in comparison.used))
    given = dict.fromkeys(option for row in comparison.used for option in _options(row))
    options = "".join(f" --option {option}" for option in given)
    command = (
        f"flexlora compare config.toml --methods {names} --seeds {len(comparison.seeds)}{options}"
    )
    text = f"Save this config as config.toml and start it (flexlora {runs[0].facts.version})."
    listing = Details("config.toml", [Code(dump(config))])
    return Section("Reproduce", [Paragraph(text), Code(command), listing])


def _compare_table(comparison: Comparison) -> dict[str, Any]:
    """The variants, and for each method the settings in which any method differs."""
    keys = sorted({key for row in comparison.rows for key in row.own})
    table: dict[str, Any] = {}
    if any(row.variant for row in comparison.rows):
        table["variants"] = {row.variant: dict(row.changes) for row in comparison.rows}
    if keys:
        table["settings"] = {
            row.kind: {key: _at(row.runs[0].facts.config, key) for key in keys}
            for row in comparison.rows
            if row.runs
        }
    return table


def _at(config: Mapping[str, Any], dotted: str) -> Any:
    value: Any = config
    for part in dotted.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _run_cells(
    comparison: Comparison, row: Row, run: Measured, reports: Mapping[tuple[str, int], str]
) -> list[str | Link]:
    group, path = comparison.group, reports.get((row.method, run.seed))
    last, bytes_sent = run.last(group) if group else None, sent(run)
    return [
        row.method,
        str(run.seed),
        number(comparison.loss(run), 3),
        number(last.rouge_l if last else None, 1),
        number(worst_client(group)(run) if group else None, 3),
        NOTHING if bytes_sent is None else size(bytes_sent),
        duration(run.seconds, 1),
        Link(REPORT, path) if path else NOTHING,
    ]


def _spread(run: Measured, group: str) -> ClientSpread | None:
    last = run.last(group)
    return tables.client_spread(last, tables.METRICS[-1]) if last else None


def _part(run: Measured, group: str, name: str) -> float | None:
    spread = _spread(run, group)
    value: float | None = getattr(spread, name) if spread else None
    return value


def _worse_off(run: Measured, group: str) -> float | None:
    """The share in percent of the clients whose loss is higher than before training."""
    first, last = run.before(group), run.last(group)
    if first is None or last is None:
        return None
    changes = tables.client_changes(first, last, tables.METRICS[-1])
    compared = [c for c in changes if c.before is not None]
    worse = [c for c in compared if c.before is not None and c.after > c.before]
    return 100 * len(worse) / len(compared) if compared else None


def _options(row: Row) -> Iterator[str]:
    """The options of a method that its runs were given, as ``--option`` takes them."""
    section = row.runs[0].facts.config.get("method") if row.runs else None
    for key, value in (section if isinstance(section, Mapping) else {}).items():
        if key != "name":
            yield f"{row.kind}.{key}={value}"
