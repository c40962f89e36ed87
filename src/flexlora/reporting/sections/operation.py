"""What a run cost, what each client did, and how to repeat it."""

from __future__ import annotations

from collections.abc import Sequence

from flexlora.journal import Event, number, size
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
from flexlora.reporting.tables import ClientRow, RunFacts


def cost(events: Sequence[Event]) -> Section:
    """Bytes and seconds by round."""
    traffic, times = tables.traffic_table(events), tables.time_table(events)
    drawn, parts = [], list[Part]()
    if traffic:
        caption = "Bytes from the clients (up) and to the clients (down), of all clients together."
        drawn.append(Figure("Traffic by round", figures.traffic(traffic), caption))
        plot = figures.traffic_total(traffic)
        drawn.append(Figure("Traffic since the start", plot, "The same, summed over rounds."))
    else:
        parts.append(missing("No completed round counted its bytes."))
    if times:
        caption = "Wall-clock time of a round, split into training with exchange and aggregation."
        drawn.append(Figure("Time by round", figures.times(times), caption))
    else:
        parts.append(missing("No completed round measured its time."))
    return Section("Cost", [*parts, *grid(drawn)])


def clients(events: Sequence[Event], facts: RunFacts) -> Section:
    """A table of what each client did."""
    rows = tables.client_table(events)
    if not rows:
        return Section("Clients", [missing("No client has completed a round.")])
    head = ["Client", "Rank type", "Rounds", "Failed", "Examples", "Up", "Down", "Last loss"]
    of = f"{len(rows):,}" + (f" of {facts.clients:,}" if facts.clients else "")
    note = Paragraph(
        "Rounds are those with a usable upload; failed are those without one, with the last "
        "reason. Examples and bytes are summed over the rounds; the last loss is the mean training "
        "loss of the client's last round, in nats per token."
    )
    table = Table(head, [_client_cells(row) for row in rows], {0, 1, 3})
    return Section("Clients", [note, Details(f"{of} clients took part", [table])])


def reproduce(facts: RunFacts) -> Section:
    """The config and the versions with which the run can be repeated."""
    from flexlora.config import dump  # loads PyTorch, which a page otherwise does not need

    version = facts.version or "(version not recorded)"
    seed = (
        f" Its seed, {facts.seed}, determines all random draws." if facts.seed is not None else ""
    )
    command = (
        "start the server with flexlora serve config.toml, and each client with flexlora join"
        if facts.real
        else "run it with flexlora run config.toml"
    )
    sentence = f"Save the config below as config.toml and {command} (flexlora {version}).{seed}"
    config: Part = (
        Details("Config of the run", [Code(dump(facts.config))])
        if facts.config
        else missing("The config was not recorded.")
    )
    versions = ", ".join(f"{name} {value}" for name, value in facts.versions.items())
    text = f"Versions: {versions or 'not recorded'}."
    return Section("Reproduce", [Paragraph(sentence), config, Paragraph(text)])


def _client_cells(row: ClientRow) -> list[str]:
    return [
        row.client,
        ", ".join(row.rank_types) or "–",
        f"{row.rounds:,}",
        f"{row.lost:,} ({row.last_reason})" if row.lost else "0",
        f"{row.examples:,}",
        size(row.bytes_up),
        size(row.bytes_down),
        number(row.last_loss, 2),
    ]
