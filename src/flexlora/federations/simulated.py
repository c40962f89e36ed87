"""All clients in this process, one after another, on one resident base model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from flexlora.client import Job, Workplace, turn
from flexlora.federation import Lost, Reply


@dataclass(frozen=True)
class Simulated:
    """A federation in process. An error in a turn is a fault to see, not a lost client."""

    here: Workplace

    def exchange(self, jobs: Iterable[Job]) -> Iterator[Reply | Lost]:
        """The replies in the order of the jobs."""
        for job in jobs:
            try:
                data = turn(job, self.here)
            except Exception as error:
                error.add_note(f"In the turn of client {job.client!r} in round {job.round}.")
                raise
            yield Reply(job.client, data)
