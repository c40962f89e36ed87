"""What remains of a run: an append-only journal of events; reports read it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexlora.journal.events import JOURNAL, Event
from flexlora.journal.reader import events_after


@dataclass(frozen=True)
class Record:
    """The journal of the run in ``folder``; ``events.EVENTS`` documents its events."""

    folder: Path

    @property
    def path(self) -> Path:
        """The journal's file."""
        return self.folder / JOURNAL

    @property
    def bytes(self) -> int:
        """The current length of the journal; a checkpoint stores it."""
        return self.path.stat().st_size if self.path.exists() else 0

    def append(self, event: str, **fields: Any) -> Event:
        """Write one event, make sure that it is on the disk, and return it.

        Raises:
            ValueError: a field contains NaN or infinity, which JSON cannot represent.
        """
        entry: Event = {"event": event, "time": round(time.time(), 3), **fields}
        line = json.dumps(entry, allow_nan=False)
        with self.path.open("a", encoding="utf-8") as journal:
            journal.write(line + "\n")
            journal.flush()
            os.fsync(journal.fileno())
        return entry

    def rewind(self, length_bytes: int) -> None:
        """Remove what was written after the journal had this length."""
        if self.bytes > length_bytes:
            os.truncate(self.path, length_bytes)

    def events(self, *types: str) -> Iterator[Event]:
        """The events in order, all of them or those of the types named.

        A last line cut off by a crash is left out.

        Raises:
            ProtocolError: a line is not an event.
        """
        for event, _ in events_after(self.path):
            if not types or event["event"] in types:
                yield event


def mean_scores(clients: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Example-weighted means of an evaluation's rows: totals are added, then divided once.

    ``rouge_l`` and ``exact_match`` are in percent, ``loss`` in nats per token.
    """
    examples = sum(row["examples"] for row in clients)
    tokens = sum(row["loss_tokens"] for row in clients)
    return {
        "examples": examples,
        "rouge_l": 100 * sum(row["rouge_l"] for row in clients) / max(examples, 1),
        "exact_match": 100 * sum(row["exact_match"] for row in clients) / max(examples, 1),
        "loss": sum(row["loss_total"] for row in clients) / max(tokens, 1),
    }
