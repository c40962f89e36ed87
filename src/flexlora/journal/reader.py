"""The one reader of journals: whole, from a byte offset, or while the journal grows."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from flexlora.journal.events import EVENTS, JOURNAL, Event
from flexlora.journal.lines import is_checked, opened_line
from flexlora.storage import DamagedFile
from flexlora.storage.untrusted import short

_COMPARED_BYTES = 4096


def events_after(path: Path, offset_bytes: int = 0) -> Iterator[tuple[Event, int]]:
    """The events after an offset in the journal at ``path``, each with the offset after it.

    A journal that does not exist has no events. A last line that is still being written, or was
    cut off by a crash, is left out.

    Raises:
        DamagedFile: a line is not an event, or not as it was written.
    """
    try:
        journal = path.open("rb")
    except FileNotFoundError:
        return
    with journal:
        for event, line in _whole_lines(journal, path, offset_bytes):
            offset_bytes += len(line)
            yield event, offset_bytes


class Journal:
    """A reader that follows a growing journal: each time it reads only what is new."""

    def __init__(self, folder: Path) -> None:
        self.path = Path(folder) / JOURNAL
        self._offset_bytes, self._last_line = 0, b""

    def news(self) -> Iterator[Event | None]:
        """The events since the last call, in order; none while the journal does not exist.

        None among them voids everything before it: the journal was cut back, as when a run is
        resumed, and all of its events follow from the beginning. A last line that is still being
        written is left for the next call. Costs the new lines and one read of at most 4 KiB.

        Raises:
            DamagedFile: a line is not an event; the next call meets it again.
        """
        try:
            journal = self.path.open("rb")
        except FileNotFoundError:
            if self._offset_bytes:
                self._restart()
                yield None
            return
        with journal:
            if not self._continues(journal):
                self._restart()
                yield None
            for event, line in _whole_lines(journal, self.path, self._offset_bytes):
                self._offset_bytes += len(line)
                # It contains a time: after a cut no other line in its place is equal to it.
                self._last_line = line[-_COMPARED_BYTES:]
                yield event

    def _restart(self) -> None:
        self._offset_bytes, self._last_line = 0, b""

    def _continues(self, journal: BinaryIO) -> bool:
        """Whether the lines read before are still in the file.

        The length does not tell: a journal may have been cut and have grown again since.
        """
        if os.fstat(journal.fileno()).st_size < self._offset_bytes:
            return False
        journal.seek(self._offset_bytes - len(self._last_line))
        return journal.read(len(self._last_line)) == self._last_line


def sound_lines(path: Path, length_bytes: int) -> Iterator[tuple[Event, bytes]]:
    """The events in the first bytes of a damaged journal that can be read, with their lines."""
    with path.open("rb") as journal:
        for line in journal.read(length_bytes).splitlines(keepends=True):
            try:
                yield _event(line), line
            except ValueError:
                continue


def _whole_lines(journal: BinaryIO, path: Path, offset_bytes: int) -> Iterator[tuple[Event, bytes]]:
    """The events after an offset with their lines, up to a line that is not complete."""
    journal.seek(offset_bytes)
    for line in journal:
        if not line.endswith(b"\n"):
            return
        try:
            event = _event(line)
        except ValueError as error:
            number = _line_number(journal, offset_bytes)
            raise DamagedFile(
                path,
                f"has a damaged line, {number}",
                sentence=f"Line {number} of {path} is not an event ({short(error)}); resume the "
                "run, which keeps the lines that can be read, or remove the line.",
            ) from error
        offset_bytes += len(line)
        yield event, line


def _event(line: bytes) -> Event:
    """The event in a line.

    Raises:
        ValueError: it is not an event, or a damaged one.
    """
    if not line.endswith(b"\n"):
        raise ValueError("it was cut off")
    event = opened_line(line)
    if not isinstance(event.get("event"), str):
        raise ValueError("it has no 'event'")
    if not is_checked(line) and event["event"] in EVENTS:
        # Of another version, or written by hand: nothing else says that it is complete.
        missing = [name for name in EVENTS[event["event"]].fields if name not in event]
        if missing:
            raise ValueError(f"it has no {missing[0]!r}")
    return event


def _line_number(journal: BinaryIO, offset_bytes: int) -> int:
    """The number, from 1, of the line that starts at an offset."""
    journal.seek(0)
    return journal.read(offset_bytes).count(b"\n") + 1
