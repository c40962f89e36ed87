"""The server's side of a run of real clients: its folder, its process, and the round loop."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch

from flexlora.config import Experiment
from flexlora.deployment import run_spec
from flexlora.deployment.server.limits import RankLimits
from flexlora.deployment.server.registry import ClientRegistry
from flexlora.errors import ProtocolError
from flexlora.federation import Transport, checkpoint, compose, rounds, served
from flexlora.journal import Record
from flexlora.method import Feature, for_mixed_modules, require
from flexlora.storage import is_locked, locked, write_atomically

PLAN = "serve.json"
CONFIG = "config.json"
PID = "serverapp.pid"
"""The number of the process that runs the rounds; written once it has the lock."""
LOCK = "serverapp.lock"
_LOCK_SECONDS = 30.0


@dataclass(frozen=True)
class ServePlan:
    """What is fixed once for a run: its id, the clients it waits for, whether it has keys.

    ``bound``: names of clients belong to keys.
    """

    run: str
    clients: int
    bound: bool

    @classmethod
    def new(cls, clients: int, bound: bool) -> ServePlan:
        """A plan with a random id."""
        return cls(secrets.token_hex(16), clients, bound)

    @classmethod
    def read(cls, folder: Path) -> ServePlan:
        """The plan in a run's folder."""
        return cls(**json.loads((folder / PLAN).read_text(encoding="utf-8")))


class ConnectingTransport(Transport, Protocol):
    """A transport whose clients connect one by one."""

    def wait_for_clients(self, count: int) -> None:
        """Wait until this many clients have connected."""
        ...


def write_run_folder(folder: Path, settings: Experiment, plan: ServePlan) -> None:
    """Write what ``run_server`` needs into the run's folder.

    Raises:
        ProtocolError: real clients cannot run this config.
    """
    check(settings)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / CONFIG, settings.model_dump_json(indent=1).encode())
    write_atomically(folder / PLAN, json.dumps(asdict(plan)).encode())


def read_config(folder: Path) -> Experiment:
    """The config in a run's folder."""
    text = (folder / CONFIG).read_text(encoding="utf-8")
    return compose.parse(json.loads(text), str(folder / CONFIG))


def check(settings: Experiment) -> None:
    """Refuse a config that only a simulation can run.

    Raises:
        ProtocolError: with the remedy.
    """
    limits, method = RankLimits.of(settings.ranks), compose.method_of(settings)
    if limits.mixed:
        require(
            method,
            Feature.MIXED_RANKS,
            "it needs one rank for all clients, but ranks.clients and ranks.rank name several; "
            "name one",
        )
    if not limits.same_modules:
        for_mixed_modules(method)  # which may refuse
    evaluation = settings.evaluation
    evaluated = evaluation.seen_clients or evaluation.unseen_clients
    if evaluated and Feature.PERSONAL in method.features:
        raise ProtocolError(
            "With this method each client has a model of its own, which stays on its machine, so "
            "the server cannot evaluate it: set evaluation.seen_clients = 0 and "
            "evaluation.unseen_clients = 0."
        )


def has_begun(folder: Path) -> bool:
    """Whether the process that runs the rounds has started, or has started and ended."""
    return (folder / PID).exists()


def is_alive(folder: Path) -> bool:
    """Whether that process runs, or has not started yet."""
    return not has_begun(folder) or is_locked(folder / LOCK)


def clear_pid(folder: Path) -> None:
    """Remove the number of an earlier process, before a new one starts."""
    (folder / PID).unlink(missing_ok=True)


@contextmanager
def _pid_lock(folder: Path) -> Iterator[None]:
    """Hold the run's lock, which the system releases however this process ends."""
    # A process whose SuperLink was killed takes a while to end.
    with locked(folder, LOCK, seconds=_LOCK_SECONDS):
        # The number is written last: where it is visible, the lock is taken.
        write_atomically(folder / PID, str(os.getpid()).encode())
        yield


Connect = Callable[[ClientRegistry, str, int], ConnectingTransport]
"""Makes the transport, from the registry, the run spec for nodes as JSON, and the quorum."""


def run_server(folder: Path, connect: Connect) -> None:
    """Run the federation of a folder, or resume it; all events go to its journal."""
    with _pid_lock(folder):
        try:
            _run(folder, connect)
        except Exception as error:
            Record(folder).append("stopped", reason=f"{type(error).__name__}: {error}")
            raise


def _run(folder: Path, connect: Connect) -> None:
    settings = read_config(folder)
    plan = ServePlan.read(folder)
    torch.set_num_threads(settings.run.threads or torch.get_num_threads())
    base = settings.model.load()
    modules = list(base.shapes)
    limits, method = RankLimits.of(settings.ranks), compose.method_of(settings)
    largest = limits.largest()
    registry = ClientRegistry(
        folder=folder,
        limits=limits,
        modules=modules,
        bound=plan.bound,
        one_rank=Feature.MIXED_RANKS not in method.features,
        all_modules=Feature.PER_MODULE not in method.features,
        most_examples=settings.federation.most_examples,
    )
    spec = run_spec.of(settings, plan.run, asdict(largest)).model_dump_json()
    quorum = settings.federation.quorum
    transport = connect(registry, spec, quorum)
    resume = (folder / checkpoint.POINTER).exists()
    transport.wait_for_clients(quorum if resume else plan.clients)
    ready = served.served(settings, base, registry, largest.by_module(modules))
    for _ in rounds.run(ready, folder, transport, resume=resume):
        pass
