"""One process of a Ray cluster that trains one client, or group of clients, after another."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flexlora.federation.client_turn import TurnRequest
from flexlora.federation.ray.partial_step import SentPart, Step
from flexlora.storage import write_new

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
"""Bytes as Ray hands them over: in shared memory, without a copy for each reader."""

Turns = Callable[[Iterable[TurnRequest]], Iterable[bytes]]
"""Trains one group of clients: an upload for each request, in their order."""

Build = Callable[[], Turns]
"""Builds what a worker keeps, in the worker's own process; it is sent there, and so pickled."""


@dataclass(frozen=True)
class QueuedTurn:
    """A request without its download; ``file`` names one that several requests share."""

    client: str
    round: int
    file: str | None


class Worker:
    """Built once, then used for local training; what it keeps is resident as long as it lives.

    ``folder`` is its own: what an earlier worker left there is removed. A relative one is among
    the temporary files of the worker's machine.
    """

    def __init__(self, build: Build, folder: str) -> None:
        self._build = build
        self._turns: Turns | None = None
        self._exchange = 0
        self._step: Step | None = None
        self._folder = Path(tempfile.gettempdir()) / folder
        self._empty()
        # So that nothing is left behind when it is killed in a turn, which has such files too.
        tempfile.tempdir = str(self._folder)

    def open(self) -> None:
        """Build what it keeps, unless it is built."""
        self._built()

    def turns(
        self, exchange: int, group: Sequence[QueuedTurn], *downloads: Bytes | None
    ) -> list[Bytes]:
        """The uploads of a group; None is a shared download that came before in this exchange."""
        turns, self._step = self._built(), None
        if exchange != self._exchange:
            self._empty()
            self._exchange = exchange
        # Drawn by the trainer, so that a download that it writes to the disk is not kept in memory.
        uploads = turns(self._jobs(group, downloads))
        return [np.frombuffer(upload, np.uint8) for upload in uploads]

    def hold(self, step: Step) -> bool:
        """Keep what a server step starts from; returns whether its files are on this machine."""
        self._step = step if step.sees_the_same_files() else None
        return self._step is not None

    def part(self, modules: Sequence[str]) -> SentPart:
        """These modules after the step."""
        assert self._step is not None
        return self._step.computed(modules)

    def close(self) -> None:
        """Remove its files."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _empty(self) -> None:
        self.close()
        self._folder.mkdir(mode=0o700, parents=True)

    def _built(self) -> Turns:
        if self._turns is None:
            self._turns = self._build()
        return self._turns

    def _jobs(self, group: Sequence[QueuedTurn], downloads: Sequence[Any]) -> Iterator[TurnRequest]:
        for each, data in zip(group, downloads, strict=True):
            if each.file is None:
                yield TurnRequest(each.client, each.round, data.tobytes())
                continue
            path = self._folder / each.file
            if data is not None:
                write_new(path, data.data)
            yield TurnRequest(each.client, each.round, path)
