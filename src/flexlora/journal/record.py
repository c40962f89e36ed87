"""What remains of a run: an append-only journal of events; reports read it."""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from flexlora.journal.events import JOURNAL, Event
from flexlora.journal.lines import checked_line
from flexlora.journal.reader import events_after, sound_lines
from flexlora.storage import append, write_atomically
from flexlora.storage.untrusted import one_line

_BLOCK_BYTES = 2**20
_TEXTS: Final = frozenset({"reason", "note", "device"})
"""The fields of events that are for people, some with words of clients."""
_LONGEST_TEXT: Final = 4000


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

        Texts for people may come from strangers: each is one printable line, and cut.

        Raises:
            ValueError: a field contains NaN or infinity, which JSON cannot represent.
            OSError: the disk is full.
        """
        texts = {key: one_line(fields[key], _LONGEST_TEXT) for key in _TEXTS & fields.keys()}
        entry: Event = {"event": event, "time": round(time.time(), 3), **fields, **texts}
        append(self.path, checked_line(entry))
        return entry

    def rewind(self, length_bytes: int) -> None:
        """Remove what was written after the journal had this length."""
        if self.bytes > length_bytes:
            os.truncate(self.path, length_bytes)

    def mark(self, before: Mark | None = None) -> Mark:
        """The length and the SHA-256 of the journal; reads what is new since ``before``."""
        return (before or Mark.start()).after(self.path, self.bytes)

    def agrees(self, mark: Mark) -> bool:
        """Whether the journal still begins with what it was when the mark was made."""
        return Mark.start().after(self.path, mark.bytes) == mark

    def mend(self, until_bytes: int, last_round: int, aside: Path) -> None:
        """Keep what can be read of a damaged journal; the damaged one is kept as ``aside``.

        That are the events of its first ``until_bytes`` bytes that are as they were written, of
        rounds up to ``last_round``.
        """
        if not self.path.exists():
            return
        if not aside.exists():
            write_atomically(aside, self.path.read_bytes())
        lines = sound_lines(self.path, until_bytes)
        kept = [line for event, line in lines if _round(event) <= last_round]
        write_atomically(self.path, b"".join(kept))

    def events(self, *types: str) -> Iterator[Event]:
        """The events in order, all of them or those of the types named.

        A last line cut off by a crash is left out.

        Raises:
            DamagedFile: a line is not an event, or not as it was written.
        """
        for event, _ in events_after(self.path):
            if not types or event["event"] in types:
                yield event


@dataclass(frozen=True)
class Mark:
    """How long a journal was, in bytes, and the SHA-256 of all of it."""

    bytes: int
    sha256: str
    running: Any = field(default=None, compare=False, repr=False)

    @classmethod
    def start(cls) -> Mark:
        """The mark of a journal that is empty."""
        running = hashlib.sha256()
        return cls(0, running.hexdigest(), running)

    def after(self, path: Path, length_bytes: int) -> Mark:
        """The mark of the first bytes of a journal that has grown since this one.

        Reads only what is new. A journal that is shorter gives a mark that no other one equals.
        """
        if self.running is None or length_bytes < self.bytes:
            return Mark.start().after(path, length_bytes)
        running, left = self.running.copy(), length_bytes - self.bytes
        if left and path.exists():
            with path.open("rb") as journal:
                journal.seek(self.bytes)
                while block := journal.read(min(left, _BLOCK_BYTES)):
                    running.update(block)
                    left -= len(block)
        return Mark(length_bytes - left, running.hexdigest(), running)


def _round(event: Event) -> float:
    number = event.get("round", 0)
    return number if isinstance(number, int) else math.inf


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
