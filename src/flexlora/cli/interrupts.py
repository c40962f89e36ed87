"""What an interrupt (Ctrl-C) does to the program before, while and after a command runs.

Imports nothing that takes time: an interrupt may come in the first second.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOPPED = 130
"""The exit code of a command that was interrupted, as shells have it."""


def end_silently() -> None:
    """From now on an interrupt ends this process at once, without a word, with ``STOPPED``.

    While a program is imported or ends there is nothing to clean up, and a ``KeyboardInterrupt``
    there would be a traceback, or be swallowed by the library that is being imported. A process
    started to ignore interrupts, as with ``nohup``, goes on ignoring them.
    """
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, _end)


@contextmanager
def raised() -> Iterator[None]:
    """In this block an interrupt raises ``KeyboardInterrupt``, where it had ended the process."""
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGINT) is not _end:
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, _end)


def _end(number: int, frame: FrameType | None) -> None:
    os._exit(STOPPED)
