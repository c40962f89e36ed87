"""The journal of a run, read while it grows: each time only what is new."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from flexlora.errors import ProtocolError
from flexlora.journal.record import JOURNAL, Event

_KNOWN_BYTES = 4096


class Journal:
    """A reader that remembers where it stopped."""

    def __init__(self, folder: Path) -> None:
        self.path = Path(folder) / JOURNAL
        self._read_bytes, self._lines = 0, 0
        self._known = b""

    def news(self) -> Iterator[Event | None]:
        """The events since the last time, in order; a journal that is not there has none.

        None among them says that what was told before is void: the journal was cut back, as when
        a run is resumed, and is told from its beginning. A last line that is still being written
        is left for the next time. Costs what is new, and one read of at most 4 KiB.

        Raises:
            ProtocolError: a line is no event; it is met again the next time.
        """
        try:
            journal = self.path.open("rb")
        except FileNotFoundError:
            if self._read_bytes:
                self._forget()
                yield None
            return
        with journal:
            if not self._continues(journal):
                self._forget()
                yield None
            journal.seek(self._read_bytes)
            for line in journal:
                if not line.endswith(b"\n"):
                    return
                event = self._event(line)
                self._read_bytes += len(line)
                self._lines += 1
                # It has a time in it: after a cut no other line is like it at its place.
                self._known = line[-_KNOWN_BYTES:]
                yield event

    def _forget(self) -> None:
        self._read_bytes, self._lines, self._known = 0, 0, b""

    def _continues(self, journal: BinaryIO) -> bool:
        """Whether what was read still stands there.

        Its length alone does not tell: a journal may have been cut and have grown again since.
        """
        if os.fstat(journal.fileno()).st_size < self._read_bytes:
            return False
        journal.seek(self._read_bytes - len(self._known))
        known: bytes = journal.read(len(self._known))
        return known == self._known

    def _event(self, line: bytes) -> Event:
        try:
            event = json.loads(line)
            if isinstance(event, dict) and isinstance(event.get("event"), str):
                return event
            fault = "it has no 'event'"
        except ValueError as error:
            fault = str(error)
        raise ProtocolError(
            f"Line {self._lines + 1} of {self.path} is no event ({fault}); resume the run, which "
            "cuts the journal back to its last checkpoint, or remove the line."
        )
