"""Jobs on their way to workers: drawn group by group, their downloads where workers find them."""

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
from flexlora.federation.ray.worker import Asked

_STORED_BYTES: Final = 100_000
"""Downloads of one client that are larger are kept for it in Ray's object store."""


@dataclass
class Group:
    """Clients that train together; downloads are arrays, or references to stored ones."""

    asked: Sequence[Asked]
    downloads: Sequence[Any]
    deaths: int = 0


@dataclass
class JobQueue:
    """The jobs that nobody has taken; drawn group by group, each shared file stored once."""

    jobs: Iterator[TurnRequest]
    together: int
    drawn: deque[Group] = field(default_factory=deque)
    files: dict[Path, tuple[str, Any]] = field(default_factory=dict)

    @property
    def left(self) -> bool:
        """Whether there is a group to take, which is then drawn."""
        if not self.drawn:
            held = [self._stored(job) for job in itertools.islice(self.jobs, self.together)]
            if held:
                asked, downloads = zip(*held, strict=True)
                self.drawn.append(Group(asked, downloads))
        return bool(self.drawn)

    def clients(self) -> Iterator[str]:
        """All that are left, which are then gone."""
        while self.drawn:
            yield from (each.client for each in self.drawn.popleft().asked)
        yield from (job.client for job in self.jobs)

    def _stored(self, job: TurnRequest) -> tuple[Asked, Any]:
        held = job.download
        if isinstance(held, Path) and held in self.files:
            name, stored = self.files[held]
            return Asked(job.client, job.round, name), stored
        if isinstance(held, Path):
            name = f"{len(self.files)}.safetensors"
            self.files[held] = name, ray.put(np.fromfile(held, np.uint8))
            return Asked(job.client, job.round, name), self.files[held][1]
        data = np.frombuffer(held, np.uint8)
        stored = data if len(held) < _STORED_BYTES else ray.put(data)
        return Asked(job.client, job.round, None), stored
