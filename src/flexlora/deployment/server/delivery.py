"""After the last round: which clients have the finished adapter, and what they are sent."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from flexlora import peft_format, wire
from flexlora.deployment.server.run_files import DELIVERED
from flexlora.storage import DamagedFile, read_sealed, sha256, write_sealed


@dataclass(frozen=True)
class Finished:
    """The finished adapter as it travels, the SHA-256 of the server's file, and the rounds."""

    payload: bytes
    digest: str
    rounds: int

    @classmethod
    def of(cls, folder: Path, rounds: int) -> Finished:
        """The adapter in a PEFT directory; in memory once."""
        adapter = peft_format.read(folder, dtype=None).adapter
        payload = wire.encode(adapter, {"kind": "adapter"}, torch.float32)
        return cls(payload, digest_of(folder), rounds)

    @property
    def facts(self) -> dict[str, Any]:
        """What a client is told beside the adapter."""
        return {"digest": self.digest, "rounds": self.rounds}


@dataclass
class Ledger:
    """Which clients have confirmed an adapter of this ``digest``; stored in the run's folder.

    An entry is the time of the confirmation. Those of another adapter do not count: the run may
    have had more rounds since.
    """

    folder: Path
    digest: str
    entries: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        stored = _stored(self.folder)
        if stored.get("digest") == self.digest:
            self.entries = dict(stored["clients"])

    def open(self) -> None:
        """Record that the adapter is being delivered."""
        self._write()

    def add(self, client: str) -> bool:
        """Record a confirmation; returns whether it is the client's first."""
        is_new = client not in self.entries
        self.entries[client] = round(time.time(), 3)
        self._write()
        return is_new

    def without(self, clients: Iterable[str]) -> list[str]:
        """Those of the clients that have not confirmed it."""
        return [client for client in clients if client not in self.entries]

    def _write(self) -> None:
        _write(self.folder, {"digest": self.digest, "clients": self.entries})


def digest_of(adapter: Path) -> str:
    """The SHA-256 of the weights in a PEFT directory."""
    return sha256(adapter / peft_format.WEIGHTS)


def is_closed(folder: Path) -> bool:
    """Whether the delivery of the run in ``folder`` has ended."""
    return _stored(folder).get("closed") is True


def close(folder: Path) -> None:
    """Record that nothing is delivered any more."""
    _write(folder, {**_stored(folder), "closed": True})


def reopen(folder: Path) -> None:
    """Let a delivery that has ended begin again."""
    if is_closed(folder):
        _write(folder, {**_stored(folder), "closed": False})


def forget(folder: Path) -> None:
    """Remove what an earlier end of the run has left: it has more rounds now."""
    (folder / DELIVERED).unlink(missing_ok=True)


def _write(folder: Path, content: Mapping[str, Any]) -> None:
    write_sealed(folder / DELIVERED, content)


def _stored(folder: Path) -> dict[str, Any]:
    try:
        return read_sealed(folder / DELIVERED)
    except (FileNotFoundError, DamagedFile):
        # Clients that have the adapter are sent it once more, and confirm it again.
        return {}
