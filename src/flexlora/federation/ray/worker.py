"""One process of a Ray cluster that takes the turns of one client, or group, after another."""

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

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
"""How bytes travel: Ray hands arrays over in shared memory, without a copy for each reader."""

Turns = Callable[[Iterable[TurnRequest]], Iterable[bytes]]
"""The turns of one group of clients: an upload for each job, in their order."""

Build = Callable[[], Turns]
"""Makes what a worker keeps, in the worker's own process; it is sent there, and so pickled."""


@dataclass(frozen=True)
class Asked:
    """A job without its download; ``file`` names one that several jobs of an exchange share."""

    client: str
    round: int
    file: str | None


class Worker:
    """Built once, then asked for turns; what it keeps is resident as long as it lives.

    ``folder`` is its own: what a worker before it left there is removed. A relative one is
    among the temporary files of the worker's machine.
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
        """Build what it keeps, unless that is done."""
        self._made()

    def turns(self, exchange: int, asked: Sequence[Asked], *downloads: Bytes | None) -> list[Bytes]:
        """The uploads of a group; None is a shared download that came before in this exchange."""
        turns, self._step = self._made(), None
        if exchange != self._exchange:
            self._empty()
            self._exchange = exchange
        # Drawn by whoever trains, so that a download that it writes to the disk is not kept.
        uploads = turns(self._jobs(asked, downloads))
        return [np.frombuffer(upload, np.uint8) for upload in uploads]

    def hold(self, step: Step) -> bool:
        """Keep what a server step starts from; whether the files that it names are here."""
        self._step = step if step.sees_the_same_files() else None
        return self._step is not None

    def part(self, modules: Sequence[str]) -> SentPart:
        """These modules of the step that it holds, after the step."""
        assert self._step is not None
        return self._step.computed(modules)

    def close(self) -> None:
        """Remove its files."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _empty(self) -> None:
        self.close()
        self._folder.mkdir(mode=0o700, parents=True)

    def _made(self) -> Turns:
        if self._turns is None:
            self._turns = self._build()
        return self._turns

    def _jobs(self, asked: Sequence[Asked], downloads: Sequence[Any]) -> Iterator[TurnRequest]:
        for each, data in zip(asked, downloads, strict=True):
            if each.file is None:
                yield TurnRequest(each.client, each.round, data.tobytes())
                continue
            path = self._folder / each.file
            if data is not None:
                path.write_bytes(data.data)
            yield TurnRequest(each.client, each.round, path)
