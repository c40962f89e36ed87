"""What an owner lets a server's requests take: bytes in memory and on the disk, and time."""

from __future__ import annotations

import ctypes
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import torch

from flexlora.errors import ConfigError, ProtocolError
from flexlora.journal import duration
from flexlora.training import free_bytes

DAY: Final = 24 * 3600.0
_SHARE_OF_MEMORY: Final = 0.125
"""Of the free memory, for one message: Flower's two processes and the client's hold parts of it
at the same time."""
_SHARE_OF_DISK: Final = 0.5
_LEAST_MESSAGE_BYTES: Final = 2**26
_MOST_MEMORY_BYTES: Final = 2**40
"""Where the system does not report its free memory."""


@dataclass(frozen=True)
class Limits:
    """The most that a server's requests may take on a client's machine.

    ``message_bytes`` bounds what the server sends at once, as it travels and unpacked.
    ``kept_bytes`` bounds the updates of the base model that a run keeps on the disk. ``seconds``
    ends the local training of a round.

    Raises:
        ConfigError: a limit is not above 0.
    """

    message_bytes: int
    kept_bytes: int
    seconds: float = DAY

    def __post_init__(self) -> None:
        for name in ("message_bytes", "kept_bytes", "seconds"):
            if not getattr(self, name) > 0:
                raise ConfigError(
                    f"A client's {name} is {getattr(self, name)}; give a number above 0."
                )

    @classmethod
    def of_machine(
        cls,
        memory_bytes: int | None = None,
        disk_bytes: int | None = None,
        seconds: float | None = None,
        state: Path = Path(),
    ) -> Limits:
        """The owner's limits; of those that are not given a share of what is free now.

        ``state`` is the folder of local client state, on whose disk updates are kept.
        """
        if memory_bytes is None:
            free = min(free_bytes(torch.device("cpu")), _MOST_MEMORY_BYTES)
            memory_bytes = max(int(_SHARE_OF_MEMORY * free), _LEAST_MESSAGE_BYTES)
        if disk_bytes is None:
            existing = next(p for p in (state, *state.resolve().parents) if p.exists())
            disk_bytes = max(int(_SHARE_OF_DISK * shutil.disk_usage(existing).free), 1)
        return cls(memory_bytes, disk_bytes, DAY if seconds is None else seconds)


@contextmanager
def ended_after(seconds: float, what: str) -> Iterator[None]:
    """End Python code of this thread that takes longer, such as the loops of a chat template.

    Raises:
        ProtocolError: the time is over; ``what`` says of what.
    """
    thread, over = threading.get_ident(), threading.Event()

    def end(error: type[BaseException] | None) -> None:
        raised = None if error is None else ctypes.py_object(error)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), raised)

    def ring() -> None:
        over.set()
        end(_TimeOver)

    timer = threading.Timer(seconds, ring)
    timer.daemon = True
    try:
        timer.start()
        yield
        timer.cancel()
        timer.join()
        end(None)  # where the time was over in the last moment
    except _TimeOver:
        pass
    finally:
        timer.cancel()
    if over.is_set():
        raise ProtocolError(
            f"{what} was ended: it has taken {duration(seconds)}, this client's limit "
            "(join --seconds)."
        )


class _TimeOver(BaseException):
    """Raised in a thread from another; no handler of ``Exception`` takes it for its own."""


@dataclass
class TimeLimit:
    """Ends local training that takes, or is going to take, more than ``seconds``.

    Called before each step with the number of steps done and of all. After a fiftieth of the time
    it also ends what would take twice as long as it may, by the mean time of its steps.
    """

    seconds: float
    _turn_began: float = field(default=0.0, init=False)
    _training_began: float = field(default=0.0, init=False)

    def begin(self) -> None:
        """The local training of a round begins."""
        self._turn_began = time.monotonic()

    def __call__(self, done: int, steps: int) -> None:
        """Raise ProtocolError if the time is over, or cannot be enough."""
        now = time.monotonic()
        if done == 0:
            self._training_began = now
        if now - self._turn_began > self.seconds:
            raise ProtocolError(
                f"Local training was ended after {done} of {steps} steps: it has taken "
                f"{duration(self.seconds)}, this client's limit for a round (join --seconds)."
            )
        passed = now - self._training_began
        expected = passed * steps / max(done, 1)
        if passed > self.seconds / 50 and expected > 2 * self.seconds:
            raise ProtocolError(
                f"Local training was ended after {done} of {steps} steps: at this speed it would "
                f"take {duration(expected)}, and this client's limit for a round is "
                f"{duration(self.seconds)} (join --seconds)."
            )
