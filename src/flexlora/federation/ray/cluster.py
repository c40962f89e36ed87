"""A Ray cluster, joined or started by this process, and a run's workers on it."""

from __future__ import annotations

import logging
import math
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import ray
import torch

from flexlora import addresses
from flexlora.config import Experiment
from flexlora.errors import ConfigError
from flexlora.federation.client_store import PRIVATE, ClientStore
from flexlora.federation.prepared import PreparedRun
from flexlora.federation.ray.pool import RayTransport
from flexlora.federation.ray.resident import Resident, described
from flexlora.storage import scratch
from flexlora.training import clients_at_once

_SECONDS_TO_ANSWER: Final = 10.0
_NO_NUMBER: Final = "The number of workers is open; give --workers, or set run.threads."


@dataclass(frozen=True)
class Machine:
    """The processors and GPUs of one machine."""

    cpus: int
    gpus: int


@dataclass(frozen=True)
class Cluster:
    """A connected cluster, and how many workers of how many threads a run has on it.

    ``gpus`` is 1 if each worker has a GPU to itself. ``scratch`` is where workers keep
    downloads; None: among the temporary files of their machine.
    """

    workers: int
    threads: int
    gpus: int = 0
    scratch: Path | None = None

    def settings(self, experiment: Experiment) -> Experiment:
        """The experiment with this many threads, in this process too, so that all round alike."""
        run = experiment.run.model_copy(update={"threads": self.threads})
        return experiment.model_copy(update={"run": run})

    @contextmanager
    def federation(
        self, ready: PreparedRun, folder: Path, clients_at_once: int | None = None
    ) -> Iterator[RayTransport]:
        """The clients of an experiment that runs in ``folder``, on workers that end with this.

        Each worker reads the data and loads the model by itself, from the same paths as this
        process. ``clients_at_once`` are trained at a time, by default as many as the config
        says or as are worth it, measured here.

        Raises:
            ConfigError: at the first exchange, if a worker cannot do so or finds other data.
        """
        at_once = clients_at_once or self._clients_at_once(ready)
        settings = self.settings(ready.experiment)
        if self.gpus:
            # Ray shows a worker only its own GPU, whatever its number.
            model = replace(settings.model, device="cuda")
            settings = settings.model_copy(update={"model": model})
        private = ClientStore((folder / PRIVATE).resolve(), shared=True)
        resident = Resident(
            settings.model_dump_json(), private, Path.cwd(), at_once, described(ready)
        )
        resources = {"num_cpus": self.threads, "num_gpus": self.gpus}
        transport = RayTransport(resident, self.workers, resources, at_once, self.scratch)
        try:
            yield transport
        finally:
            transport.close()

    def _clients_at_once(self, ready: PreparedRun) -> int:
        """How many clients a worker trains at a time: as the config says, or measured.

        No more than leave every worker something to do, and as if all workers shared one
        machine's memory.
        """
        runtime, shapes = ready.runtime, ready.base.shapes
        parameters = sum(rank * sum(shapes[module]) for module, rank in ready.ranks.items())
        cohort = min(ready.cohort_size, len(ready.clients))
        return ready.experiment.run.clients_at_once or clients_at_once(
            ready.base,
            runtime.store,
            (runtime.rows[id] for id in ready.clients),
            runtime.training,
            parameters * (1 if self.gpus else self.workers),
            math.ceil(cohort / self.workers),
        )


@contextmanager
def cluster(
    experiment: Experiment, workers: int | None = None, address: str | None = None
) -> Iterator[Cluster]:
    """The cluster at an address, or one on this machine only, which ends with this.

    Without an address a cluster to which this process is connected is used, and not stopped.

    Raises:
        ConfigError: no cluster answers there, or there is no room for this many workers.
    """
    on_gpu = torch.device(experiment.model.device).type == "cuda"
    threads = experiment.run.threads
    if address is None and not ray.is_initialized():
        machine = Machine(_cores(), torch.cuda.device_count() if on_gpu else 0)
        with _started(shared(machine, threads, workers, on_gpu)) as started:
            yield started
        return
    joined = address is not None
    if joined:
        _join(str(address))
    try:
        machines = [
            Machine(int(node["Resources"].get("CPU", 0)), int(node["Resources"].get("GPU", 0)))
            for node in ray.nodes()  # type: ignore[no-untyped-call]
            if node["Alive"]
        ]
        yield fitted(machines, threads, workers, on_gpu)
    finally:
        if joined:
            ray.shutdown()


def shared(machine: Machine, threads: int | None, workers: int | None, on_gpu: bool) -> Cluster:
    """This machine's cores in equal groups, one per worker; more threads than cores on request.

    Raises:
        ConfigError: there are fewer GPUs than workers, or nothing says how many workers.
    """
    if on_gpu:
        workers = workers or machine.gpus
        if not workers:
            raise ConfigError("model.device is CUDA, and this machine has no GPU.")
        if workers > machine.gpus:
            raise ConfigError(
                f"{workers} workers on CUDA need a GPU each, and this machine has "
                f"{machine.gpus}; give fewer --workers."
            )
    workers = workers or (machine.cpus // threads if threads else 0)
    if not workers:
        raise ConfigError(_NO_NUMBER)
    return Cluster(workers, threads or max(machine.cpus // workers, 1), int(on_gpu))


def fitted(
    machines: Sequence[Machine], threads: int | None, workers: int | None, on_gpu: bool
) -> Cluster:
    """Workers on a cluster's machines: as many as requested, of as many threads as fit.

    Raises:
        ConfigError: there is no room for them, or nothing says how many workers.
    """

    def room(threads: int) -> int:
        """How many workers of this many threads fit."""
        return sum(min(m.cpus // threads, m.gpus if on_gpu else m.cpus) for m in machines)

    if workers is None:
        workers = room(threads or 1) if on_gpu or threads else 0
        if not workers and not on_gpu and not threads:
            raise ConfigError(_NO_NUMBER)
    wanted = max(workers, 1)
    most = max((machine.cpus for machine in machines), default=0)
    fits = next((t for t in range(most, 0, -1) if room(t) >= wanted), 1)
    fitting = Cluster(wanted, threads or fits, int(on_gpu))
    if room(fitting.threads) < wanted:
        each = f"{fitting.threads} threads{' and a GPU' if on_gpu else ''}"
        raise ConfigError(
            f"The Ray cluster has room for {room(fitting.threads)} workers of {each}, not for "
            f"{wanted}; give fewer --workers, or set run.threads to less."
        )
    return fitting


@contextmanager
def _started(plan: Cluster) -> Iterator[Cluster]:
    """A cluster on this machine with just enough room."""
    # Ray's sockets lie there too, and their paths must be short.
    place = Path("/tmp") if os.name == "posix" else None
    with scratch("ray", place) as folder:
        # Ray lets everybody write in its own folder, so that it lies in one of ours.
        session = folder / "s"
        session.mkdir(mode=0o700)
        _connect(
            num_cpus=plan.workers * plan.threads,
            num_gpus=plan.workers * plan.gpus,
            include_dashboard=False,
            _temp_dir=str(session),
        )
        try:
            yield replace(plan, scratch=folder / "downloads")
        finally:
            ray.shutdown()


def _join(address: str) -> None:
    if ray.is_initialized():
        raise ConfigError(
            f"This process is connected to a Ray cluster already; leave it before {address!r}."
        )
    try:
        _answers(address)
        _connect(address=address)
    except Exception as error:  # of many kinds, by the kind of address
        raise ConfigError(
            f"No Ray cluster can be joined at {address!r} ({error}). Start one with: ray start "
            "--head, and give its address: HOST:PORT, ray://HOST:PORT or auto."
        ) from error


def _answers(address: str) -> None:
    """Check that a server listens there: Ray would try for minutes."""
    target = addresses.split(address.removeprefix("ray://"))
    if target is not None:
        socket.create_connection(target, _SECONDS_TO_ANSWER).close()


def _connect(**options: Any) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # What Ray will do by default, and warns of until then: on CPUs GPUs are not hidden.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)


def _cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
