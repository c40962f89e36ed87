"""The seam between the round loop and wherever the clients are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from flexlora.client import Job


@dataclass(frozen=True)
class Reply:
    """What a client sent: bytes, not yet looked at."""

    client: str
    data: bytes


@dataclass(frozen=True)
class Lost:
    """A client that did not reply, and why."""

    client: str
    reason: str


class Federation(Protocol):
    """Carries jobs to clients and replies back."""

    @property
    def together(self) -> int:
        """How many consecutive jobs are worked on as one; 1 where clients do not meet."""
        ...

    def exchange(self, jobs: Iterable[Job]) -> Iterator[Reply | Lost]:
        """One reply or loss for each job, as they arrive, in any order.

        Jobs are drawn when there is somebody to take them, so that not all downloads of a
        round are in memory at once.
        """
        ...
