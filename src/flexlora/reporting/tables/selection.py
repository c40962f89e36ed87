"""Which events of a journal count: by type, and of repeated ones the last."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flexlora.journal import Event


def of_type(events: Iterable[Event], event_type: str) -> list[Event]:
    """The events of one type, in order."""
    return [event for event in events if event["event"] == event_type]


def last_of(events: Iterable[Event], event_type: str, *keys: str) -> list[Event]:
    """The events of one type; of those that agree in ``keys``, only the last."""
    chosen = of_type(events, event_type)
    return list({tuple(e.get(key) for key in keys): e for e in chosen}.values())


def last_start(events: Iterable[Event]) -> Event:
    """The last start of the run; an empty event if the journal has none."""
    return next(iter(reversed(of_type(events, "start"))), {})


def rounds(events: Iterable[Event]) -> dict[int, Event]:
    """The completed rounds by number, ascending; of one written twice, the last."""
    return dict(sorted((event["round"], event) for event in last_of(events, "round", "round")))


def uploads(events: Iterable[Event]) -> list[Event]:
    """The usable uploads: one of each client in each round."""
    return last_of(events, "client", "round", "client")


def mean_loss(events: Sequence[Event]) -> float | None:
    """The mean training loss of these events in nats per token; None without tokens."""
    complete = [e for e in events if e.get("loss_total") is not None and e.get("loss_tokens")]
    tokens = sum(e["loss_tokens"] for e in complete)
    return sum(e["loss_total"] for e in complete) / tokens if tokens else None


def total(events: Iterable[Mapping[str, Any]], key: str) -> Any:
    """The sum of a field, which may be missing."""
    return sum(event.get(key) or 0 for event in events)
