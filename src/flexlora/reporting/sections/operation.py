"""What a run cost, what each client did, and how to repeat it."""

from __future__ import annotations

from collections.abc import Sequence

from flexlora.journal import Event, byte_unit, counted, duration, number, size
from flexlora.reporting import figures, tables
from flexlora.reporting.document import (
    Code,
    Details,
    Figure,
    Paragraph,
    Part,
    Section,
    Table,
    grid,
    missing,
)
from flexlora.reporting.names import shortened
from flexlora.reporting.tables import ClientRow, RoundRow, RunFacts
from flexlora.reporting.tables.selection import of_type

LONGEST_TABLE = 12
FEW_ROUNDS = 2
"""Up to this number of rounds nothing is drawn: the numbers stand in the table."""


def rounds(events: Sequence[Event]) -> Section:
    """Uploads, bytes and seconds by round."""
    rows = tables.round_table(events)
    if not rows:
        return Section("Rounds", [missing("No round was completed.")])
    note = Paragraph(
        "Uploads are usable ones; failed clients returned none, and “not needed” are those that "
        "came after the round had enough. Up is from the clients to the server, down the other "
        "way, both of all clients together. Time is wall-clock time, of which aggregation."
    )
    parts: list[Part] = [note, _round_table(rows[:LONGEST_TABLE])]
    if len(rows) > LONGEST_TABLE:
        short = _round_table([*rows[:3], *rows[-3:]])
        every = Details(f"All {len(rows):,} rounds", [_round_table(rows)])
        parts = [note, Paragraph("First and last three rounds:"), short, every]
    return Section("Rounds", [*parts, *_bounded(events), *grid(_drawn(events, rows))])


def _bounded(events: Sequence[Event]) -> list[Part]:
    """What was done about uploads and rounds that would have changed the model too much."""
    sentences = []
    if clipped := of_type(events, "clipped"):
        clients = len({str(event["client"]) for event in clipped})
        most = number(max(event["ratio"] for event in clipped), 1)
        sentences.append(
            f"{counted(len(clipped), 'upload')} of {counted(clients, 'client')} were scaled down, "
            f"as they changed up to {most} times as much as the median upload."
        )
    if limited := of_type(events, "limited"):
        sentences.append(
            f"In {counted(len(limited), 'round')} a client had more than the largest share of the "
            "weights, and counted less."
        )
    if kept := of_type(events, "kept"):
        sentences.append(
            f"{counted(len(kept), 'round')} left the model as it was; the last one: "
            f"{shortened(str(kept[-1]['reason']), 160)}"
        )
    return [Paragraph(" ".join(sentences))] if sentences else []


def clients(events: Sequence[Event], facts: RunFacts) -> Section:
    """A table of what each client did."""
    rows = tables.client_table(events)
    if not rows:
        return Section("Clients", [missing("No client has completed a round.")])
    head = ["Client", "Rank type", "Rounds", "Failed", "Examples", "Up", "Down", "Last loss"]
    head.append("Last failure")
    of = f"{len(rows):,}" + (f" of {facts.clients:,}" if facts.clients else "")
    note = Paragraph(
        "Rounds are those with a usable upload; failed are those without one. Examples and bytes "
        "are summed over the rounds; the last loss is the mean training loss of the client's last "
        "round, in nats per token. A click on a column's head sorts by it."
    )
    table = Table(head, [_client_cells(row) for row in rows], {0, 1, 8}, sortable=True)
    return Section("Clients", [note, Details(f"{of} clients took part", [table])])


def reproduce(facts: RunFacts) -> Section:
    """The config and the versions with which the run can be repeated."""
    from flexlora.config import dump  # loads PyTorch, which a page otherwise does not need

    if not facts.config:
        return Section("Reproduce", [missing("The config was not recorded.")])
    versions = ", ".join(f"{name} {value}" for name, value in facts.versions.items())
    seed = (
        f" Its seed, {facts.seed}, determines all random draws." if facts.seed is not None else ""
    )
    commands = ["flexlora run config.toml"]
    which = "it"
    if facts.real:
        which = "the server, and at each client join with its own rows"
        commands = [
            "flexlora serve config.toml --keys KEYS",
            "flexlora join SERVER:8090 --keys KEYS --data ROWS",
        ]
    text = f"Save this config as config.toml and start {which} (flexlora {facts.version})."
    parts: list[Part] = [
        Paragraph(f"{text}{seed}"),
        Code("\n".join(commands)),
        Details("config.toml", [Code(dump(facts.config))]),
    ]
    if facts.real:
        parts.append(
            Paragraph(
                "KEYS is the folder of the machine's own keys, made with flexlora keys, SERVER the "
                "server's host name, ROWS the client's file. The clients' rows are not part of "
                "this config."
            )
        )
    return Section("Reproduce", [*parts, Paragraph(f"Versions: {versions or 'not recorded'}.")])


def _round_table(rows: Sequence[RoundRow]) -> Table:
    failures = any(row.failed or row.not_needed for row in rows)
    head = ["Round", "Uploads", *(["Failed", "Not needed"] if failures else []), "Training loss"]
    head += ["Up", "Down", "Time", "Aggregation"]
    cells = []
    for row in rows:
        kinds = ", ".join(f"{kind.text}: {n:,}" for kind, n in row.failed.items())
        lost = [f"{sum(row.failed.values()):,}" + (f" ({kinds})" if kinds else "")]
        lost.append(f"{row.not_needed:,}")
        cells.append(
            [
                f"{row.round:,}",
                number(row.received, 0),
                *(lost if failures else []),
                number(row.loss, 3),
                *(_size(count) for count in (row.bytes_up, row.bytes_down)),
                duration(row.seconds, 2),
                duration(row.aggregation, 2),
            ]
        )
    return Table(head, cells, {2} if failures else ())


def _size(count: int | None) -> str:
    return number(None, 0) if count is None else size(count)


def _drawn(events: Sequence[Event], rows: Sequence[RoundRow]) -> list[Figure]:
    if len(rows) <= FEW_ROUNDS:
        return []
    drawn = []
    traffic, times = tables.traffic_table(events), tables.time_table(events)
    if traffic:
        divisor, unit = byte_unit(max(traffic[-1].total_up, traffic[-1].total_down))
        up, down = (n / divisor for n in (traffic[-1].total_up, traffic[-1].total_down))
        caption = f"Of all clients together; in all rounds {up:,.1f} {unit} up and {down:,.1f} "
        drawn.append(Figure("Bytes by round", figures.traffic(traffic), f"{caption}{unit} down."))
    if times:
        caption = "Wall-clock time of a round, split into training with exchange and aggregation."
        drawn.append(Figure("Time by round", figures.times(times), caption))
    if any(row.failed or row.not_needed for row in rows):
        caption = "Usable uploads, failed clients, and uploads that came when there were enough."
        drawn.append(Figure("Uploads by round", figures.uploads(rows), caption))
    return drawn


def _client_cells(row: ClientRow) -> list[str]:
    return [
        row.client,
        ", ".join(row.rank_types) or "–",
        f"{row.rounds:,}",
        f"{row.lost:,}",
        f"{row.examples:,}",
        size(row.bytes_up),
        size(row.bytes_down),
        number(row.last_loss, 2),
        shortened(row.last_reason, 160) if row.last_reason else "–",
    ]
