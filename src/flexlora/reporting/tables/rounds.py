"""The rounds and the clients of a run as rows: training loss, bytes, seconds, losses."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from flexlora.journal import Event, LossKind, loss_kind
from flexlora.reporting.names import natural
from flexlora.reporting.tables.selection import mean_loss, of_type, rounds, total, uploads


@dataclass(frozen=True)
class TrainingRow:
    """The mean training loss of a round in nats per token; without a rank type, of all clients."""

    round: int
    rank_type: str | None
    loss: float | None


@dataclass(frozen=True)
class TrafficRow:
    """Bytes between server and clients in a round, and since the start."""

    round: int
    up: int
    down: int
    total_up: int
    total_down: int


@dataclass(frozen=True)
class TimeRow:
    """Seconds of a round: training and exchange, then aggregation."""

    round: int
    training: float
    aggregation: float


@dataclass(frozen=True)
class RoundRow:
    """One completed round: its uploads, and what it cost; None is what was not counted.

    ``failed`` are clients without a usable upload, by kind; ``not_needed`` uploads came when the
    round had enough.
    """

    round: int
    received: int | None
    failed: Mapping[LossKind, int]
    not_needed: int
    loss: float | None
    bytes_up: int | None
    bytes_down: int | None
    seconds: float | None
    aggregation: float | None


@dataclass(frozen=True)
class ClientRow:
    """One client over the whole run.

    ``rounds`` counts its usable uploads, ``lost`` the rounds in which it had none, except those
    that were not needed. ``examples`` counts every pass of every round.
    """

    client: str
    rank_types: tuple[str, ...]
    rounds: int
    lost: int
    last_reason: str | None
    examples: int
    bytes_up: int
    bytes_down: int
    last_loss: float | None


def training_table(events: Sequence[Event]) -> list[TrainingRow]:
    """The mean training loss of each completed round: of all clients, then by rank type."""
    by_round = rounds(events)
    of_rank_type: dict[tuple[int, str], list[Event]] = defaultdict(list)
    for event in uploads(events):
        if event["round"] in by_round and event.get("rank_type") is not None:
            of_rank_type[event["round"], str(event["rank_type"])].append(event)
    rows = [TrainingRow(number, None, mean_loss([event])) for number, event in by_round.items()]
    for name in sorted({name for _, name in of_rank_type}, key=natural):
        rows += [
            TrainingRow(number, name, mean_loss(of_rank_type[number, name]))
            for number in by_round
            if (number, name) in of_rank_type
        ]
    return rows


def traffic_table(events: Iterable[Event]) -> list[TrafficRow]:
    """The bytes of each completed round that counted them, and the sums so far."""
    rows: list[TrafficRow] = []
    total_up = total_down = 0
    for number, event in rounds(events).items():
        up, down = event.get("bytes_up"), event.get("bytes_down")
        if up is not None and down is not None:
            total_up, total_down = total_up + up, total_down + down
            rows.append(TrafficRow(number, up, down, total_up, total_down))
    return rows


def time_table(events: Iterable[Event]) -> list[TimeRow]:
    """The seconds of each completed round that measured itself and its aggregation."""
    return [
        TimeRow(number, event["seconds"] - event["aggregate_seconds"], event["aggregate_seconds"])
        for number, event in rounds(events).items()
        if event.get("seconds") is not None and event.get("aggregate_seconds") is not None
    ]


def round_table(events: Sequence[Event]) -> list[RoundRow]:
    """What each completed round received, lost and cost."""
    losses: dict[int, Counter[LossKind]] = defaultdict(Counter)
    for event in of_type(events, "lost"):
        losses[event["round"]][loss_kind(event)] += 1
    return [
        RoundRow(
            round=number,
            received=event.get("received"),
            failed={k: n for k, n in losses[number].items() if k is not LossKind.NOT_NEEDED},
            not_needed=losses[number][LossKind.NOT_NEEDED],
            loss=mean_loss([event]),
            bytes_up=event.get("bytes_up"),
            bytes_down=event.get("bytes_down"),
            seconds=event.get("seconds"),
            aggregation=event.get("aggregate_seconds"),
        )
        for number, event in rounds(events).items()
    ]


def client_table(events: Sequence[Event]) -> list[ClientRow]:
    """What each client did, in natural order of the names."""
    by_client: dict[str, list[Event]] = defaultdict(list)
    for event in uploads(events):
        by_client[str(event["client"])].append(event)
    lost: dict[str, list[Event]] = defaultdict(list)
    for event in of_type(events, "lost"):
        if loss_kind(event) is not LossKind.NOT_NEEDED:
            lost[str(event["client"])].append(event)
    return [
        _client_row(client, by_client[client], lost[client])
        for client in sorted(by_client.keys() | lost.keys(), key=natural)
    ]


def loss_counts(events: Iterable[Event]) -> list[tuple[LossKind, int]]:
    """How often clients were lost by kind, the most frequent first."""
    return Counter(loss_kind(event) for event in of_type(events, "lost")).most_common()


def _client_row(client: str, trained: Sequence[Event], lost: Sequence[Event]) -> ClientRow:
    types = (str(t["rank_type"]) for t in trained if t.get("rank_type") is not None)
    return ClientRow(
        client=client,
        rank_types=tuple(dict.fromkeys(types)),
        rounds=len(trained),
        lost=len(lost),
        last_reason=str(lost[-1].get("reason")) if lost else None,
        examples=total(trained, "examples"),
        bytes_up=total(trained, "bytes_up"),
        bytes_down=total(trained, "bytes_down"),
        last_loss=mean_loss(trained[-1:]),
    )
