"""What an owner lets a server's requests take: bytes in memory and on the disk, and time."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from flexlora.errors import ConfigError
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
