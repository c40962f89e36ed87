"""What a run writes down: an append-only journal of events, and how it is read."""

from flexlora.journal.answers import ANSWERS, SampleAnswers
from flexlora.journal.events import EVENTS, JOURNAL, Event, EventType, LossKind, loss_kind
from flexlora.journal.meter import Meter
from flexlora.journal.reader import Journal, events_after
from flexlora.journal.record import Mark, Record, mean_scores
from flexlora.journal.units import (
    NOTHING,
    age,
    byte_unit,
    counted,
    duration,
    number,
    size,
)

__all__ = [
    "ANSWERS",
    "EVENTS",
    "JOURNAL",
    "NOTHING",
    "Event",
    "EventType",
    "Journal",
    "LossKind",
    "Mark",
    "Meter",
    "Record",
    "SampleAnswers",
    "age",
    "byte_unit",
    "counted",
    "duration",
    "events_after",
    "loss_kind",
    "mean_scores",
    "number",
    "size",
]
