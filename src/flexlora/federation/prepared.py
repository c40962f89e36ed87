"""Everything that a run needs, once its config is prepared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from flexlora.config import Experiment
from flexlora.data import Prompt
from flexlora.errors import ConfigError
from flexlora.evaluation import Question
from flexlora.federation.client_turn import ClientRuntime
from flexlora.federation.population import Population
from flexlora.lowrank import Adapter
from flexlora.method import Averager, Feature, FreshAdapters, Method, RoundContext
from flexlora.model import Base


@dataclass(frozen=True)
class PreparedRun:
    """Everything a run needs in memory.

    ``ranks`` is the largest rank of any client by module. ``local`` is where clients train in
    this process: None where they are real ones, of which more may join while the run goes on.
    Nothing else changes. ``notices`` are sentences that the user must read at the start: what is
    configured and has no effect, or is done in another way than usual.
    """

    experiment: Experiment
    base: Base
    method: Method
    averager: Averager
    clients: Population
    ranks: Mapping[str, int]
    unseen: Sequence[str]
    local: ClientRuntime | None
    questions: Sequence[Question]
    prompt: Prompt
    notices: tuple[str, ...] = ()

    @property
    def runtime(self) -> ClientRuntime:
        """Where clients train in this process.

        Raises:
            ConfigError: they do not, as they are real ones.
        """
        if self.local is None:
            raise ConfigError("The clients of this run are on machines of their own.")
        return self.local

    def with_runtime(self, **changes: Any) -> PreparedRun:
        """The same run with these fields of its ``runtime`` replaced."""
        return replace(self, local=replace(self.runtime, **changes))

    def fresh(self) -> Adapter:
        """The adapter before training: the largest ranks, ``B`` zero, ``A`` LoRA's start."""
        return FreshAdapters(self.base.shapes, self.experiment.seed).common(self.ranks)

    def context(self, round: int) -> RoundContext:
        """What the method's hooks are called with in this round."""
        return RoundContext(round, self.experiment.seed, self.shapes, self.ranks)

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """The shape of every module that a client trains."""
        return {m: shape for m, shape in self.base.shapes.items() if m in self.ranks}

    @property
    def truncated(self) -> dict[str, Mapping[str, int]]:
        """The ranks by module of the types to which the last adapter is also evaluated truncated.

        Those below the largest ranks; none if the config does not ask for it, or if clients have
        models of their own.
        """
        wanted = self.experiment.evaluation.truncated
        if not wanted or Feature.PERSONAL in self.method.features:
            return {}
        kinds = self.clients.kinds.items()
        return {name: ranks for name, ranks in kinds if dict(ranks) != dict(self.ranks)}

    @property
    def wire_dtype(self) -> torch.dtype:
        """The dtype in which adapters travel."""
        return dtype(self.experiment.federation.wire_dtype)

    @property
    def cohort_size(self) -> int:
        """How many clients a round invites: a fraction is of the population, at least one."""
        federation = self.experiment.federation
        if federation.cohort is not None:
            return federation.cohort
        return max(int((federation.fraction or 0) * len(self.clients) + 1e-9), 1)


def dtype(name: str) -> torch.dtype:
    """PyTorch's dtype of this name."""
    value: torch.dtype = getattr(torch, name)
    return value
