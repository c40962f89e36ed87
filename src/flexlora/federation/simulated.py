"""All clients in this process, a few at a time, on one resident base model."""

from __future__ import annotations

import ctypes
import gc
import itertools
import sys
import time
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from flexlora.federation.client_turn import ClientRuntime, TurnRequest, turns
from flexlora.federation.transport import Lost, Reply, WaitPolicy
from flexlora.journal import LossKind
from flexlora.storage import scratch, write_new

_LARGE_BYTES: Final = 2**25
"""Downloads whose training leaves holes worth closing; for less the time is worth more."""


@dataclass(frozen=True)
class SimulatedTransport:
    """A federation in process. An error in a turn is a fault to see, not a lost client."""

    runtime: ClientRuntime
    clients_at_once: int = 1

    def present(self, clients: Collection[str]) -> list[str]:
        """All of them."""
        return list(clients)

    def exchange(self, jobs: Iterable[TurnRequest], patience: WaitPolicy) -> Iterator[Reply | Lost]:
        """The replies in the order of the jobs, ``clients_at_once`` of which are trained at a time.

        Those whose turn has not begun when the time is over are lost.
        """
        waiting, started = iter(jobs), time.monotonic()
        with scratch() as folder:
            while not patience.enough() and (
                group := [
                    _on_disk(job, folder / f"{place}.safetensors")
                    for place, job in enumerate(itertools.islice(waiting, self.clients_at_once))
                ]
            ):
                if patience.seconds is not None and time.monotonic() - started > patience.seconds:
                    late = f"Its local training had not begun after {patience.seconds:g} s."
                    kind = LossKind.NOT_BEGUN
                    yield from (Lost(job.client, late, kind) for job in (*group, *waiting))
                    return
                try:
                    uploads = turns(group, self.runtime)
                except Exception as error:
                    names = ", ".join(repr(job.client) for job in group)
                    error.add_note(f"In the turn of client {names} in round {group[0].round}.")
                    raise
                if sum(job.bytes_down for job in group) >= _LARGE_BYTES:
                    _give_back_memory()
                while uploads:
                    yield Reply(group[-len(uploads)].client, uploads.pop(0))


def _on_disk(job: TurnRequest, file: Path) -> TurnRequest:
    """The job with its download in a file: a turn of rank 200 needs the memory for itself."""
    if isinstance(job.download, Path):
        return job
    write_new(file, job.download)
    return replace(job, download=file)


def _give_back_memory() -> None:
    """Return freed memory to the system, where the C library can (glibc).

    A client of rank 200 leaves holes of some 0.5 GiB between buffers still in use, which
    the next client, of other sizes, would not fill.
    """
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
