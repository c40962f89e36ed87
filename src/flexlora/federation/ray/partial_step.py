"""A server step on workers: which files it reads, and its parts on their way back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flexlora import wire
from flexlora.lowrank import Adapter, Factors
from flexlora.method import (
    Cohort,
    Feature,
    MergeLog,
    Method,
    RoundContext,
    State,
    partial_step,
)

Array = np.ndarray[Any, np.dtype[Any]]
ArrayPair = tuple[Array, Array]
"""``B`` and ``A`` as arrays, which Ray hands over in shared memory."""


@dataclass(frozen=True)
class SentPart:
    """A ``partial_step.Part`` as it travels: adapters that have not changed stay behind.

    ``arrays`` has the changed adapters by name, "" being the model, and ``updates`` those of the
    merge log that are new; ``rest`` is the state without any of them.
    """

    modules: Sequence[str]
    arrays: Mapping[str, Mapping[str, ArrayPair]]
    updates: Mapping[int, Mapping[str, ArrayPair]]
    rest: State
    unchanged: frozenset[str]

    @classmethod
    def of(cls, part: partial_step.Part, before: MergeLog) -> SentPart:
        """With each factor in memory of its own: one may be a view of much more."""
        state = part.state
        adapters = {"": state.model, **state.memory}
        changed = {name: a for name, a in adapters.items() if name not in part.unchanged}
        new = {n: u for n, u in state.merge_log.updates.items() if n not in before.updates}
        return cls(
            part.modules,
            {name: _arrays(adapter) for name, adapter in changed.items()},
            {round: _arrays(update) for round, update in new.items()},
            replace(
                state,
                model=Adapter({}),
                memory=dict.fromkeys(state.memory, Adapter({})),
                merge_log=MergeLog({}, state.merge_log.merged_until),
            ),
            part.unchanged,
        )

    def part(self) -> partial_step.Part:
        """With factors that may be written to, as all others are; a copy."""
        adapters = {name: _adapter(arrays) for name, arrays in self.arrays.items()}
        updates = {round: _adapter(arrays) for round, arrays in self.updates.items()}
        state = replace(
            self.rest,
            model=adapters.pop("", self.rest.model),
            memory={**self.rest.memory, **adapters},
            merge_log=MergeLog(updates, self.rest.merge_log.merged_until),
        )
        return partial_step.Part(self.modules, state, self.unchanged)


@dataclass(frozen=True)
class Step:
    """What a server step starts from; adapters on the disk travel as the names of their files.

    ``files`` has the size and the time of each of these as the run's own process sees them: on
    a machine that does not share its disk there is nothing there, or something else.
    """

    method: Method
    state: State
    cohort: Cohort
    context: RoundContext
    threads: int
    files: Mapping[Path, tuple[int, int]]

    @classmethod
    def of(cls, method: Method, state: State, cohort: Cohort, context: RoundContext) -> Step:
        """The step, at the threads of this process."""
        adapters = [state.model, *state.memory.values(), *state.merge_log.updates.values()]
        for upload in cohort.uploads:
            adapters += [upload.adapter, *upload.aux.values()]
        paths = [path for path in map(wire.stored_at, adapters) if path is not None]
        files = {path: _stamp(path) for path in paths}
        return cls(method, state, cohort, context, torch.get_num_threads(), files)

    def split(self, workers: int) -> list[list[str]]:
        """The modules in parts for this many workers; a single part if it cannot be shared."""
        if Feature.PER_MODULE not in self.method.features:
            return [list(self.context.ranks)]
        return partial_step.split(self.context, workers, self.threads)

    def sees_the_same_files(self) -> bool:
        """Whether this process finds the files as the run's own process has."""
        return all(path.exists() and _stamp(path) == stamp for path, stamp in self.files.items())

    def computed(self, modules: Sequence[str]) -> SentPart:
        """One part, in a worker."""
        if torch.get_num_threads() != self.threads:
            torch.set_num_threads(self.threads)  # other numbers of threads round differently
        part = partial_step.aggregate(self.method, self.state, self.cohort, self.context, modules)
        return SentPart.of(part, self.state.merge_log)


def _arrays(adapter: Adapter) -> dict[str, ArrayPair]:
    return {module: (_array(f.B), _array(f.A)) for module, f in adapter.items()}


def _adapter(arrays: Mapping[str, ArrayPair]) -> Adapter:
    return Adapter({m: Factors(torch.tensor(B), torch.tensor(A)) for m, (B, A) in arrays.items()})


def _array(factor: torch.Tensor) -> Array:
    return np.ascontiguousarray(factor.numpy())


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns
