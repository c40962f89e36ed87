"""A log that strangers cannot fill: so many lines, then a few, then a line on the others."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from flexlora.storage.untrusted import printable

_LONGEST_LINE: Final = 300


@dataclass
class LogRate:
    """A filter that lets ``burst`` lines pass at once and then one in ``seconds``.

    A line is cut to 300 characters and made printable.
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
        text = printable(record.getMessage()[:_LONGEST_LINE])
        if self._dropped:
            text = f"{text} (after {self._dropped} lines that were not written)"
            self._dropped = 0
        record.msg, record.args = text, None
        return True
