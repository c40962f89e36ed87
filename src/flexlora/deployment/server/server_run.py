"""The server's side of a run of real clients: its folder, its process, and the round loop."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Protocol

import torch

from flexlora.config import Experiment
from flexlora.deployment import run_spec
from flexlora.deployment.flower import local_users, processes
from flexlora.deployment.flower.processes import ProcessId
from flexlora.deployment.server import delivery, run_files
from flexlora.deployment.server.delivery import Finished, Ledger
from flexlora.deployment.server.limits import RankLimits
from flexlora.deployment.server.registry import ClientRegistry
from flexlora.errors import ConfigError, FlexloraError, ProtocolError, sentence
from flexlora.federation import Transport, checkpoint, compose, recovery, rounds, served
from flexlora.journal import Event, Record, counted
from flexlora.method import Feature, for_mixed_modules, require
from flexlora.peft_format import WEIGHTS
from flexlora.storage import (
    DamagedFile,
    is_locked,
    locked,
    make_private,
    read_sealed,
    write_sealed,
)
from flexlora.storage.untrusted import one_line

PLAN = "serve.json"
PID = "serverapp.pid"
"""The number and start time of the process that runs the rounds; written once it has the lock."""
LOCK = "serverapp.lock"
_LOCK_SECONDS = 30.0
_LONGEST_REASON = 2000


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
        """The plan in a run's folder. Raises DamagedFile."""
        content = read_sealed(folder / PLAN)
        return cls(content["run"], content["clients"], content["bound"])


class ConnectingTransport(Transport, Protocol):
    """A transport whose clients connect one by one."""

    def wait_for_clients(self, count: int) -> None:
        """Wait until this many clients have connected."""
        ...

    def deliver(self, finished: Finished, ledger: Ledger) -> None:
        """Send the finished adapter to every client; returns once all have confirmed it."""
        ...


def write_run_folder(folder: Path, settings: Experiment, plan: ServePlan) -> None:
    """Write what ``run_server`` needs into the run's folder.

    Raises:
        ProtocolError: real clients cannot run this config.
    """
    check(settings)
    make_private(folder)
    write_config(folder, settings)
    write_sealed(folder / PLAN, asdict(plan))


def write_config(folder: Path, settings: Experiment) -> None:
    """Write the config into a run's folder."""
    compose.store(settings, folder)


def read_config(folder: Path) -> Experiment:
    """The config in a run's folder. Raises ConfigError."""
    return compose.stored(folder)


def check(settings: Experiment) -> None:
    """Refuse a config that only a simulation can run.

    Raises:
        ProtocolError: with the remedy.
    """
    if settings.model.dtype == "auto":
        raise ProtocolError(
            'model.dtype is "auto", which every machine would choose for itself, so that clients '
            "would train different models; set model.dtype to 'float32', or to 'bfloat16' where "
            "all clients' processors compute it natively."
        )
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


def cut_back(folder: Path) -> None:
    """Cut the journal of a run back to its last checkpoint; what is damaged is noted.

    Nobody may write in the folder.
    """
    if not checkpoint.is_begun(folder):
        Record(folder).rewind(0)
        return
    for event in recovery.resume(folder).damaged:
        run_files.note(folder, f"damaged: {event['reason']}")


def has_begun(folder: Path) -> bool:
    """Whether the process that runs the rounds has started, or has started and ended."""
    return (folder / PID).exists()


def is_alive(folder: Path) -> bool:
    """Whether that process runs, or has not started yet."""
    return not has_begun(folder) or is_locked(folder / LOCK)


def end_process(folder: Path) -> None:
    """End the process that runs the rounds, if there is one, and remove its number.

    It may wait for an upload from a SuperLink that is gone, and would hold the run's lock.
    """
    identity = ProcessId.read(folder / PID)
    if identity is not None and (process := identity.running) is not None:
        processes.end([process])
    (folder / PID).unlink(missing_ok=True)


@contextmanager
def _pid_lock(folder: Path) -> Iterator[None]:
    """Hold the run's lock, which the system releases however this process ends."""
    # A process whose SuperLink was killed takes a while to end.
    with locked(folder, LOCK, _refusal(folder), seconds=_LOCK_SECONDS):
        # The number is written last: where it is visible, the lock is taken.
        ProcessId.of(os.getpid()).write(folder / PID)
        yield


def _refusal(folder: Path) -> str:
    """What a second process is told, with the number of the first."""
    identity = ProcessId.read(folder / PID)
    if identity is None or identity.running is None:
        return f"Another process runs in {folder}; let it end, or give another folder."
    return (
        f"Process {identity.pid} runs in {folder}; let it end, end it with: kill {identity.pid}, "
        "or give another folder."
    )


Connect = Callable[[ClientRegistry, str, int], ConnectingTransport]
"""Makes the transport, from the registry, the run spec for nodes as JSON, and the quorum."""


def run_server(folder: Path, connect: Connect) -> None:
    """Run the federation of a folder, or resume it; all events go to its journal."""
    with _pid_lock(folder):
        try:
            _run(folder, connect)
        except Exception as error:
            # A finished run's journal ends with its finish, whatever happens to the delivery.
            if finish_of(folder) is None:
                said = sentence(error) or f"{type(error).__name__}: {error}"
                reason = one_line(said, _LONGEST_REASON)
                Record(folder).append("stopped", reason=reason)
            raise


def finish_of(folder: Path, settings: Experiment | None = None) -> Event | None:
    """The ``finish`` event of a run that has all the rounds of its config; else None.

    ``settings`` replaces the config in the folder.
    """
    try:
        events = list(Record(folder).events("start", "finish"))
    except DamagedFile:
        return None  # the run goes on from its last checkpoint, and mends the journal
    if not events or events[-1]["event"] != "finish":
        return None
    planned = (settings or read_config(folder)).federation.rounds
    return events[-1] if events[-1]["rounds"] >= planned else None


def adapter_of(folder: Path, finish: Event) -> Path:
    """The finished adapter of a run, wherever its folder has been moved since."""
    return rounds.adapter_folder(folder, finish["rounds"])


def delivered(folder: Path, finish: Event) -> tuple[list[str], list[str]]:
    """The clients of a finished run that have its adapter, and those that may still get it."""
    adapter = adapter_of(folder, finish)
    if not adapter.is_dir():
        return [], []
    ledger = Ledger(folder, delivery.digest_of(adapter))
    registry = ClientRegistry(
        folder=folder,
        limits=RankLimits.of(read_config(folder).ranks),
        modules=[],
        bound=ServePlan.read(folder).bound,
    )
    return sorted(ledger.entries), ledger.without(filter(registry.is_authorised, registry))


def with_more_rounds(folder: Path, settings: Experiment, count: int) -> Experiment:
    """The settings of the run in ``folder`` with this number of rounds in all.

    Raises:
        ConfigError: the run has as many rounds already.
    """
    if finish := finish_of(folder, settings):
        done = finish["rounds"]
        if count <= done:
            raise ConfigError(
                f"The run in {folder} is finished after {counted(done, 'round')}; give more than "
                f"that: --set federation.rounds={done + 1}."
            )
    federation = settings.federation.model_copy(update={"rounds": count})
    return settings.model_copy(update={"federation": federation})


def _run(folder: Path, connect: Connect) -> None:
    settings = read_config(folder)
    plan = ServePlan.read(folder)
    torch.set_num_threads(settings.run.threads or torch.get_num_threads())
    limits, method = RankLimits.of(settings.ranks), compose.method_of(settings)
    finish = finish_of(folder, settings)
    base = None if finish else settings.model.load()
    modules = list(base.shapes) if base else []
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
    if base is not None:
        resume = checkpoint.is_begun(folder)
        transport.wait_for_clients(quorum if resume else plan.clients)
        ready = served.served(settings, base, registry, largest.by_module(modules))
        open_to_users = local_users.unguarded(local_users.SERVER)
        ready = replace(ready, notices=(*ready.notices, *open_to_users))
        for event in rounds.run(ready, folder, transport, resume=resume):
            finish = event
    if finish is not None:
        _deliver(folder, finish, registry, transport)


def _deliver(
    folder: Path, finish: Event, registry: ClientRegistry, transport: ConnectingTransport
) -> None:
    """Send the finished adapter to the clients, until all that may take part have it."""
    try:
        finished = Finished.of(adapter_of(folder, finish), finish["rounds"])
        if finish.get("sha256", {}).get(WEIGHTS, finished.digest) != finished.digest:
            reason = "does not agree with the checksum in the journal: it is damaged"
            raise DamagedFile(
                adapter_of(folder, finish) / WEIGHTS, reason, "restore it from a copy"
            )
    except FlexloraError as error:
        registry.note(f"the adapter cannot be sent to the clients: {error}")
        delivery.close(folder)
        return
    ledger = Ledger(folder, finished.digest)
    ledger.open()
    clients = counted(len(registry), "client")
    registry.note(
        f"the federation is finished: sending the adapter (SHA-256 {finished.digest}) to {clients}"
    )
    transport.deliver(finished, ledger)
    delivery.close(folder)
