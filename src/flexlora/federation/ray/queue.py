"""Requests on their way to workers, drawn group by group, with their downloads in the store."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import ray

from flexlora.federation.client_turn import TurnRequest
from flexlora.federation.ray.worker import QueuedTurn

_STORED_BYTES: Final = 100_000
"""Larger downloads of one client go to Ray's object store."""


@dataclass
class Group:
    """Clients that train together; downloads are arrays, or references to stored ones."""

    turns_queued: Sequence[QueuedTurn]
    downloads: Sequence[Any]
    deaths: int = 0


@dataclass
class JobQueue:
    """Requests that no worker has taken; drawn group by group, each shared file stored once."""

    jobs: Iterator[TurnRequest]
    clients_at_once: int
    drawn: deque[Group] = field(default_factory=deque)
    files: dict[Path, tuple[str, Any]] = field(default_factory=dict)

    @property
    def left(self) -> bool:
        """Whether there is a group to take; draws one if there is."""
        if not self.drawn:
            drawn = [self._stored(job) for job in itertools.islice(self.jobs, self.clients_at_once)]
            if drawn:
                turns_queued, downloads = zip(*drawn, strict=True)
                self.drawn.append(Group(turns_queued, downloads))
        return bool(self.drawn)

    def clients(self) -> Iterator[str]:
        """The clients that are left; the queue is empty afterwards."""
        while self.drawn:
            yield from (each.client for each in self.drawn.popleft().turns_queued)
        yield from (job.client for job in self.jobs)

    def _stored(self, job: TurnRequest) -> tuple[QueuedTurn, Any]:
        download = job.download
        if isinstance(download, Path) and download in self.files:
            name, stored = self.files[download]
            return QueuedTurn(job.client, job.round, name), stored
        if isinstance(download, Path):
            name = f"{len(self.files)}.safetensors"
            self.files[download] = name, ray.put(np.fromfile(download, np.uint8))
            return QueuedTurn(job.client, job.round, name), self.files[download][1]
        data = np.frombuffer(download, np.uint8)
        stored = data if len(download) < _STORED_BYTES else ray.put(data)
        return QueuedTurn(job.client, job.round, None), stored
