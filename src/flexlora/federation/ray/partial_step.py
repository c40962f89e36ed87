"""A server step on workers: which files it reads, and its parts on their way back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flexlora import wire
from flexlora.lowrank import Adapter, Factors
from flexlora.method import Method, State, Upload, partial_step

Array = np.ndarray[Any, np.dtype[Any]]
Halves = tuple[Array, Array]
"""``B`` and ``A`` as arrays, which Ray hands over in shared memory."""


@dataclass(frozen=True)
class Made:
    """A ``parts.Part`` as it travels."""

    modules: Sequence[str]
    adapters: Mapping[str, Mapping[str, Halves] | None]
    facts: Mapping[str, Any]

    @classmethod
    def of(cls, part: partial_step.Part) -> Made:
        """With each factor in memory of its own: one may be a view of much more."""

        def arrays(adapter: Adapter) -> dict[str, Halves]:
            return {module: (_array(f.B), _array(f.A)) for module, f in adapter.items()}

        adapters = {
            name: None if made is None else arrays(made) for name, made in part.adapters.items()
        }
        return cls(part.modules, adapters, part.facts)

    def part(self) -> partial_step.Part:
        """With factors that may be written to, as all others are; a copy."""

        def adapter(arrays: Mapping[str, Halves]) -> Adapter:
            return Adapter(
                {m: Factors(torch.tensor(B), torch.tensor(A)) for m, (B, A) in arrays.items()}
            )

        adapters = {
            name: None if made is None else adapter(made) for name, made in self.adapters.items()
        }
        return partial_step.Part(self.modules, adapters, self.facts)


@dataclass(frozen=True)
class Step:
    """What a server step starts from; adapters on the disk travel as the names of their files.

    ``files`` has the size and the time of each of these as the run's own process sees them: on
    a machine that does not share its disk there is nothing there, or something else.
    """

    method: Method
    state: State
    uploads: Sequence[Upload]
    threads: int
    files: Mapping[Path, tuple[int, int]]

    @classmethod
    def of(cls, method: Method, state: State, uploads: Sequence[Upload]) -> Step:
        """The step, at the threads of this process."""
        held = [*state.adapters.values(), *(upload.adapter for upload in uploads)]
        files = {path: _stamp(path) for path in map(wire.stored_at, held) if path is not None}
        return cls(method, state, uploads, torch.get_num_threads(), files)

    def dealt(self, workers: int) -> list[list[str]]:
        """The modules in parts for so many workers; a single part if it is not to be shared."""
        if not self.method.by_module:
            return [list(self.state.adapters["global"])]
        return partial_step.dealt(self.state, workers, self.threads)

    def seen(self) -> bool:
        """Whether this process finds the same files."""
        return all(path.exists() and _stamp(path) == as_ for path, as_ in self.files.items())

    def made(self, modules: Sequence[str]) -> Made:
        """One part, in a worker."""
        if torch.get_num_threads() != self.threads:
            torch.set_num_threads(self.threads)  # others would round otherwise
        return Made.of(partial_step.aggregated(self.method, self.state, self.uploads, modules))


def _array(factor: torch.Tensor) -> Array:
    return np.ascontiguousarray(factor.numpy())


def _stamp(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns
