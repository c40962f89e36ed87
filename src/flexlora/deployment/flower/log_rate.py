"""A log that strangers cannot fill: so many lines, then a few, then a line on the others."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

_LONGEST_LINE: Final = 300


@dataclass
class LogRate:
    """A filter that lets ``burst`` lines pass at once and then one in ``seconds``.

    A line is cut to 300 characters, and only printable ASCII is left of it.
    """

    burst: int = 100
    seconds: float = 10.0
    now: Callable[[], float] = time.monotonic
    _lines: float = field(init=False)
    _at: float = field(init=False)
    _dropped: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._lines, self._at = float(self.burst), self.now()

    def __call__(self, record: logging.LogRecord) -> bool:
        """Whether a record is written."""
        now = self.now()
        self._lines = min(self.burst, self._lines + (now - self._at) / self.seconds)
        self._at = now
        if self._lines < 1:
            self._dropped += 1
            return False
        self._lines -= 1
        text = _printable(record.getMessage())
        if self._dropped:
            text = f"{text} (after {self._dropped} lines that were not written)"
            self._dropped = 0
        record.msg, record.args = text, None
        return True


def _printable(text: str) -> str:
    shown = text[:_LONGEST_LINE].encode("ascii", "backslashreplace").decode("ascii")
    return "".join(each if each.isprintable() else f"\\x{ord(each):02x}" for each in shown)
