"""What a run writes down: an append-only journal of events, and how it is read."""

from flexlora.journal.events import LossKind, loss_kind
from flexlora.journal.reader import Journal
from flexlora.journal.record import JOURNAL, Event, Record, mean_scores
from flexlora.journal.units import duration, size

__all__ = [
    "JOURNAL",
    "Event",
    "Journal",
    "LossKind",
    "Record",
    "duration",
    "loss_kind",
    "mean_scores",
    "size",
]
