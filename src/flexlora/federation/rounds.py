"""The loop: pick, hand out, exchange, aggregate, record, evaluate."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import platform
import shutil
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from flexlora import peft_format
from flexlora.config import Experiment
from flexlora.errors import ProtocolError
from flexlora.evaluation import evaluate_each
from flexlora.federation import checkpoint
from flexlora.federation.checkpoint import Checkpoint
from flexlora.federation.client_store import ClientStore
from flexlora.federation.collect import Collector, draw, facts_of
from flexlora.federation.setup import PreparedRun
from flexlora.federation.simulated import SimulatedTransport
from flexlora.federation.transport import Aggregating, Transport
from flexlora.journal import Event, Record
from flexlora.lowrank import Adapter, Factors, LowRankSum, norm
from flexlora.method import Client, Fresh, State, Upload
from flexlora.training import clients_at_once

PRIVATE = "private"
"""Where in the run's folder the simulated clients keep what never travels."""

SPECTRA = 6
"""Of how many modules the journal keeps all singular values; of the others, block shares."""


def run(
    ready: PreparedRun,
    folder: str | Path,
    federation: Transport | None = None,
    resume: bool = False,
) -> Iterator[Event]:
    """Run the federation in ``folder``, yielding every event as it enters the journal.

    A run can be stopped anywhere, also by a kill, and goes on with ``resume`` from its last
    checkpoint and the uploads received since; the adapters are then the same to the bit.

    Raises:
        ProtocolError: there is nothing to resume or it was another experiment, the folder holds
            a run already, another process runs there, or nobody returned a usable upload in a
            round.
    """
    folder = Path(folder)
    if not resume:
        folder.mkdir(parents=True, exist_ok=True)
    with checkpoint.alone(folder):
        yield from _run(ready, folder, federation, resume)


def _run(
    ready: PreparedRun, folder: Path, federation: Transport | None, resume: bool
) -> Iterator[Event]:
    started = time.perf_counter()
    record = Record(folder)
    experiment = ready.experiment
    identity = _identity(experiment)
    if resume:
        point = checkpoint.load(folder)
        if point.identity != identity:
            raise ProtocolError(
                f"The run in {folder} was started with another config; only federation.rounds "
                "and the run section may change when it goes on."
            )
        _sweep(folder, point)
        record.rewind(point.journal_bytes)
    elif (folder / checkpoint.POINTER).exists():
        raise ProtocolError(f"{folder} already holds a run; resume it, or give another folder.")
    else:
        together = federation.together if federation else _together(ready)
        # No name for the first state: it would stay in memory as long as the run.
        start = ready.method.start
        point = checkpoint.save(folder, 0, 0, start(ready.fresh()), identity, together)
    if federation is None:
        here = replace(ready.workplace, private=ClientStore(folder / PRIVATE))
        federation = SimulatedTransport(here, point.together)
    facts = _start_facts(ready, resume)
    yield record.append("start", **facts, clients_at_once=federation.together)
    if point.round == 0 and experiment.evaluation.base:
        yield from _evaluated(record, ready, 0, {"base": {}})
    for number in range(point.round + 1, experiment.federation.rounds + 1):
        point = yield from _round(record, ready, federation, number, point)
    yield record.append(
        "finish",
        rounds=point.round,
        seconds=time.perf_counter() - started,
        adapter=str(adapter_folder(folder, point.round)),
    )


def _round(
    record: Record, ready: PreparedRun, federation: Transport, number: int, point: Checkpoint
) -> Generator[Event, None, Checkpoint]:
    """One round, from the picking of its clients to the checkpoint after it."""
    started, folder = time.perf_counter(), record.folder
    spool = folder / f"uploads-{number:05d}"
    spool.mkdir(exist_ok=True)
    asking = Collector(ready, federation, number, point.state, spool)
    yield from asking.events(record)
    aggregating = time.perf_counter()
    in_order = [asking.uploads[id] for id in ready.clients if id in asking.uploads]
    state = _aggregated(ready, federation, asking.state, in_order)
    adapter = ready.method.update(state)
    seconds = time.perf_counter() - aggregating
    _export(ready, adapter, adapter_folder(folder, number))
    yield record.append(
        "round",
        round=number,
        cohort=[id for id in ready.clients if id in asking.asked],
        received=len(in_order),
        **_totals([facts_of(upload, ready) for upload in in_order]),
        seconds=time.perf_counter() - started,
        aggregate_seconds=seconds,
        update_norm=math.sqrt(sum(norm(f) ** 2 for f in adapter.values())),
    )
    yield record.append("spectrum", round=number, **_spectrum(ready, adapter, state))
    yield from _evaluations(record, ready, number, adapter, state)
    point = checkpoint.save(folder, number, record.bytes, state, point.identity, point.together)
    shutil.rmtree(spool)
    if ready.experiment.run.keep_adapters == "last" and number > 1:
        shutil.rmtree(adapter_folder(folder, number - 1).parent, ignore_errors=True)
    return point


def _aggregated(
    ready: PreparedRun, federation: Transport, state: State, uploads: Sequence[Upload]
) -> State:
    """The next state, with the help of workers where the federation has any for it.

    No client weighs more than the config lets it.
    """
    most = ready.experiment.federation.most_examples
    if most is not None:
        uploads = [replace(upload, examples=min(upload.examples, most)) for upload in uploads]
    if isinstance(federation, Aggregating):
        return federation.aggregate(ready.method, state, uploads)
    return ready.method.aggregate(state, uploads)


def _together(ready: PreparedRun) -> int:
    """How many clients train at a time in this process: as the config says, or measured."""
    here, shapes = ready.workplace, ready.base.shapes
    return ready.experiment.run.clients_at_once or clients_at_once(
        ready.base,
        here.store,
        (here.rows[id] for id in ready.clients),
        here.training,
        sum(rank * sum(shapes[module]) for module, rank in ready.largest.items()),
        ready.cohort_size,
    )


def _identity(experiment: Experiment) -> str:
    """A hash of all settings that a resumed run must share with its beginning."""
    settings = experiment.model_dump(mode="json", exclude={"run": True, "federation": {"rounds"}})
    text = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _sweep(folder: Path, point: Checkpoint) -> None:
    """Remove what a kill left behind: uploads of finished rounds, files half-written."""
    for spool in folder.glob("uploads-*"):
        if int(spool.name.removeprefix("uploads-")) <= point.round:
            shutil.rmtree(spool)
    for partial in [*folder.glob(".*.partial"), *folder.glob("rounds/*/.*.partial*")]:
        shutil.rmtree(partial) if partial.is_dir() else partial.unlink()


def _totals(clients: list[dict[str, Any]]) -> dict[str, Any]:
    keys = ("examples", "tokens", "loss_total", "loss_tokens", "bytes_up", "bytes_down")
    return {key: sum(client[key] for client in clients) for key in keys}


def _spectrum(ready: PreparedRun, adapter: Adapter, state: State) -> dict[str, Any]:
    """How the global adapter's energy lies in the blocks between the clients' ranks.

    The last block is what the aggregate held beyond the largest rank, and so lost. Modules
    without any energy are left out.
    """
    levels = sorted({rank for ranks in ready.clients.kinds.values() for rank in ranks.values()})
    lost = state.facts.get("step_lost_energy", state.facts.get("lost_energy", {}))
    shown = set(list(adapter)[:: max(len(adapter) // SPECTRA + 1, 1)])
    energy, values = {}, {}
    for module, factors in adapter.items():
        S = LowRankSum.of([(1.0, factors)]).svd(0).S
        if not S.any():
            continue  # nobody has trained it yet
        kept = 1 - lost.get(module, 0.0)
        squares = (S.square() / S.square().sum().clamp_min(1e-300) * kept).tolist()
        edges = [0, *levels, len(squares)]
        blocks = [sum(squares[a:b]) for a, b in itertools.pairwise(edges)]
        energy[module] = [*blocks[:-1], blocks[-1] + 1 - kept]
        if module in shown:
            values[module] = [float(f"{value:.5g}") for value in S.tolist()]
    return {"rank_levels": levels, "energy": energy, "values": values}


def _evaluations(
    record: Record, ready: PreparedRun, number: int, adapter: Adapter, state: State
) -> Iterator[Event]:
    """The global adapter when it is its turn; at the end also cut to each rank type.

    Of a personal method it is each client's own model that answers the client's questions.
    """
    how, last = ready.experiment.evaluation, number == ready.experiment.federation.rounds
    if ready.method.personal:
        if last or (how.every and number % how.every == 0):
            yield from _evaluated_at_home(record, ready, number, state)
        return
    adapters = {}
    if last or (how.every and number % how.every == 0):
        adapters["global"] = adapter
    if last and how.truncated:
        for name, ranks in ready.clients.kinds.items():
            if dict(ranks) != dict(ready.largest):
                adapters[name] = adapter.only(ranks).first(ranks)
    yield from _evaluated(record, ready, number, adapters)


def _evaluated(
    record: Record, ready: PreparedRun, number: int, adapters: Mapping[str, Mapping[str, Factors]]
) -> Iterator[Event]:
    """These adapters side by side; each event has an equal part of the seconds."""
    if not ready.questions or not adapters:
        return
    started = time.perf_counter()
    how = ready.experiment.evaluation
    found = evaluate_each(ready.base, list(adapters.values()), ready.questions, ready.prompt, how)
    seconds = (time.perf_counter() - started) / len(adapters)
    for name, rows in zip(adapters, found, strict=True):
        yield record.append("evaluation", round=number, adapter=name, seconds=seconds, clients=rows)


def _evaluated_at_home(
    record: Record, ready: PreparedRun, number: int, state: State
) -> Iterator[Event]:
    """Every client's questions answered by its own model; one event, as of a global one."""
    started = time.perf_counter()
    private, rows = ClientStore(record.folder / PRIVATE), []
    asked = itertools.groupby(ready.questions, lambda question: question.client)
    for id, questions in asked:
        ranks = ready.clients[id].ranks if id in ready.clients else ready.largest
        client = Client(id, ranks, "", 1)
        handed = ready.method.handout(state, client, draw(ready, number + 1))
        fresh = Fresh(ready.base.shapes, ready.experiment.seed, id, number + 1)
        own = ready.method.receive(handed, private.kept(id, number + 1), fresh).adapter
        how = ready.experiment.evaluation
        rows += evaluate_each(ready.base, [own], list(questions), ready.prompt, how)[0]
    seconds = time.perf_counter() - started
    if rows:
        yield record.append(
            "evaluation", round=number, adapter="global", seconds=seconds, clients=rows
        )


def adapter_folder(folder: Path, number: int) -> Path:
    """Where the global adapter of a round lies."""
    return folder / "rounds" / f"{number:05d}" / "adapter"


def _export(ready: PreparedRun, adapter: Adapter, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    peft_format.write(adapter, target, base_model=ready.base.published, replace=True)


def _start_facts(ready: PreparedRun, resume: bool) -> dict[str, Any]:
    types = ready.clients.kinds
    shapes = ready.shapes
    return {
        "version": metadata.version("flexlora"),
        "config": ready.experiment.model_dump(mode="json"),
        "hardware": f"{platform.machine()}, {os.cpu_count()} cores, {ready.base.device}, "
        f"{torch.get_num_threads()} threads",
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", "numpy")}
        | {"python": platform.python_version()},
        "clients": len(ready.clients),
        "unseen_clients": len(ready.unseen),
        "modules": len(shapes),
        "rank_types": dict(ready.clients.counts),
        "ranks": {
            name: sorted({ranks.get(module, 0) for module in shapes})
            for name, ranks in types.items()
        },
        "trainable": {
            name: sum(rank * sum(shapes[m]) for m, rank in ranks.items())
            for name, ranks in types.items()
        },
        "resumed": resume,
    }
