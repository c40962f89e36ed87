"""What a worker keeps from the first client to the last: a base model, prepared for training."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

from flexlora.errors import ConfigError
from flexlora.federation import compose
from flexlora.federation.client_store import ClientStore
from flexlora.federation.client_turn import TurnRequest
from flexlora.federation.prepared import PreparedRun
from flexlora.federation.ray.worker import Turns
from flexlora.federation.setup import prepare
from flexlora.federation.simulated import SimulatedTransport
from flexlora.federation.transport import Reply, WaitPolicy


@dataclass(frozen=True)
class Resident:
    """What a worker keeps: the base model, the tokens, the rows of all clients.

    ``experiment`` is its config as JSON, ``data`` describes what the run's own process has read.
    """

    experiment: str
    private: ClientStore
    working_folder: Path
    clients_at_once: int
    data: str

    def __call__(self) -> Turns:
        """The function that trains a group of clients.

        Raises:
            ConfigError: this machine cannot read what the run's own process has read.
        """
        if not self.working_folder.is_dir():
            raise ConfigError(
                f"There is no folder {self.working_folder} on the worker's machine, in which "
                "the run was started; start it from a folder that all machines share."
            )
        os.chdir(self.working_folder)
        ready = prepare(compose.parse(json.loads(self.experiment), "The run's config"))
        if described(ready) != self.data:
            raise ConfigError(
                f"A worker has {described(ready)}, but the run has {self.data}; every machine "
                "needs the same version and the same data under the same paths."
            )
        runtime = replace(ready.runtime, clients=self.private)
        transport = SimulatedTransport(runtime, self.clients_at_once)

        def turns(jobs: Iterable[TurnRequest]) -> list[bytes]:
            replies = transport.exchange(jobs, WaitPolicy())
            return [reply.data for reply in replies if isinstance(reply, Reply)]

        return turns


def described(ready: PreparedRun) -> str:
    """What a worker must find as well: versions, clients, rows and tokens."""
    store = ready.runtime.store
    return (
        f"{len(ready.clients)} clients, {len(store)} rows of {int(store.offsets[-1])} tokens and "
        f"flexlora {metadata.version('flexlora')}"
    )
