"""All clients in this process, one after another, on one resident base model."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from flexlora.client import Job, Workplace, turn
from flexlora.federation import Lost, Reply


@dataclass(frozen=True)
class Simulated:
    """A federation in process. An error in a turn is a fault to see, not a lost client."""

    here: Workplace

    def exchange(self, jobs: Iterable[Job]) -> Iterator[Reply | Lost]:
        """The replies in the order of the jobs."""
        with TemporaryDirectory(prefix="flexlora-") as folder:
            for job in (_on_disk(job, Path(folder) / "download.safetensors") for job in jobs):
                try:
                    data = turn(job, self.here)
                except Exception as error:
                    error.add_note(f"In the turn of client {job.client!r} in round {job.round}.")
                    raise
                _give_back_memory()
                yield Reply(job.client, data)


def _on_disk(job: Job, file: Path) -> Job:
    """The job with its download in a file: a turn of rank 200 needs the memory for itself."""
    if isinstance(job.download, Path):
        return job
    file.unlink(missing_ok=True)  # not written over: its pages may still be mapped
    file.write_bytes(job.download)
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
