"""The loop: sample a cohort, hand out, exchange, aggregate, record, evaluate."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flexlora.config import Experiment
from flexlora.errors import AdapterError, ProtocolError
from flexlora.federation import checkpoint, recovery
from flexlora.federation.checkpoint import Checkpoint
from flexlora.federation.client_evaluations import of_clients
from flexlora.federation.client_store import PRIVATE, ClientStore
from flexlora.federation.collect import Collector, client_facts
from flexlora.federation.evaluations import Evaluations
from flexlora.federation.identity import check_same, identity, is_over
from flexlora.federation.influence import result
from flexlora.federation.influence.bounds import Accepted
from flexlora.federation.prepared import PreparedRun
from flexlora.federation.run_facts import spectrum, start_facts
from flexlora.federation.simulated import SimulatedTransport
from flexlora.federation.transport import Aggregating, Transport
from flexlora.federation.weighting import cohort_of, weights_facts
from flexlora.journal import Event, Meter, Record
from flexlora.lowrank import Adapter, norm, normalized
from flexlora.method import Cohort, State, Upload
from flexlora.model import export
from flexlora.peft_format import CONFIG, WEIGHTS
from flexlora.storage import DamagedFile, close_to_others, locked, make_private, sha256
from flexlora.training import clients_at_once


def run(
    prepared: PreparedRun,
    folder: str | Path,
    transport: Transport | None = None,
    resume: bool = False,
    meter: Meter | None = None,
) -> Iterator[Event]:
    """Run the federation in ``folder``, yielding every event as it enters the journal.

    A run can be stopped anywhere, also by a kill, and goes on with ``resume`` from its last
    checkpoint and the uploads received since; the adapters are then the same to the bit.
    More rounds than before continue a finished run; one that has all its rounds yields nothing
    and is not touched. Without a ``transport`` all clients are simulated in this process.
    ``meter`` tells how far an evaluation is, from which nothing is yielded until its end.

    Raises:
        ProtocolError: there is nothing to resume or it was another experiment, the folder holds
            a run already, another process runs there, or too few clients returned a usable
            upload in a round.
    """
    folder = Path(folder)
    if not resume:
        make_private(folder)
    with locked(folder):
        yield from run_locked(prepared, folder, transport, resume, meter)


def run_locked(
    prepared: PreparedRun,
    folder: Path,
    transport: Transport | None = None,
    resume: bool = False,
    meter: Meter | None = None,
) -> Iterator[Event]:
    """As ``run``, for a caller that has the lock of ``folder``."""
    if resume and is_complete(prepared.experiment, folder):
        return
    yield from _run(prepared, folder, transport, resume, meter or Meter())


def is_complete(experiment: Experiment, folder: Path) -> bool:
    """Whether a run has all the rounds of this config, and its files are as they were written.

    Raises:
        ProtocolError: it has finished more rounds.
    """
    record = Record(folder)
    try:
        if not is_over(experiment, record):
            return False
        *_, finish = record.events("finish")
    except DamagedFile:
        return False
    sums = finish.get("sha256")
    return sums is None or sums == _sums(adapter_folder(folder, finish["rounds"]))


@dataclass(frozen=True)
class _Run:
    """What stays the same from round to round."""

    prepared: PreparedRun
    transport: Transport
    record: Record
    folder: Path
    evaluations: Evaluations
    meter: Meter


def _run(
    prepared: PreparedRun,
    folder: Path,
    transport: Transport | None,
    resume: bool,
    meter: Meter,
) -> Iterator[Event]:
    started = time.perf_counter()
    record = Record(folder)
    if not (resume or transport or prepared.experiment.run.clients_at_once):
        meter.begin("measuring how many clients to train at a time")
    damaged: Sequence[Event] = ()
    if resume:
        point, damaged = _resumed(prepared, record)
    else:
        point = _begun(prepared, folder, transport)
    meter.end()
    if transport is None:
        store = ClientStore(folder / PRIVATE, shared=True)
        with_store = prepared.with_runtime(clients=store)
        transport = SimulatedTransport(with_store.runtime, point.clients_at_once)
    yield from damaged
    facts = start_facts(prepared, resume, point.round)
    yield record.append("start", **facts, clients_at_once=transport.clients_at_once)
    evaluations = Evaluations(prepared, record, meter)
    if point.round == 0:
        if prepared.experiment.evaluation.base:
            yield from evaluations.of_base()
        yield from of_clients(record, prepared, transport, 0, Adapter({}), point.state)
    whole = _Run(prepared, transport, record, folder, evaluations, meter)
    for number in range(point.round + 1, prepared.experiment.federation.rounds + 1):
        point = yield from _round(whole, number, point)
    adapter = adapter_folder(folder, point.round)
    yield record.append(
        "finish",
        rounds=point.round,
        seconds=time.perf_counter() - started,
        adapter=str(adapter),
        sha256=_sums(adapter),
    )


def _begun(prepared: PreparedRun, folder: Path, transport: Transport | None) -> Checkpoint:
    """The checkpoint before the first round of a new run."""
    if checkpoint.is_begun(folder):
        raise ProtocolError(
            f"{folder} already holds a run; resume it with: flexlora run --resume {folder}, or "
            "give another --out."
        )
    at_once = transport.clients_at_once if transport else _clients_at_once(prepared)
    # No name for the first state: it would stay in memory as long as the run.
    return checkpoint.save(
        folder,
        0,
        0,
        prepared.method.start(prepared.fresh(), prepared.context(0)),
        identity(prepared.experiment),
        at_once,
    )


def _resumed(prepared: PreparedRun, record: Record) -> tuple[Checkpoint, Sequence[Event]]:
    """The last checkpoint of a run that goes on, and an event for what was damaged."""
    folder, settings = record.folder, prepared.experiment
    resumed = recovery.resume(folder)
    point, damaged = resumed.point, list(resumed.damaged)
    check_same(settings, point.identity, record)
    if prepared.local is not None:
        store = ClientStore(folder / PRIVATE, shared=True)
        store.restore_updates(point.state.merge_log.updates, prepared.wire_dtype)
    if settings.run.keep_adapters == "last":
        for earlier in range(1, point.round):
            shutil.rmtree(adapter_folder(folder, earlier).parent, ignore_errors=True)
    if 0 < point.round == settings.federation.rounds:
        # Nothing else writes it any more, and it may have been damaged since it was written.
        adapter = prepared.method.global_adapter(point.state, prepared.context(point.round))
        export(prepared.base, adapter, adapter_folder(folder, point.round), replace=True)
    return point, damaged


def _round(run: _Run, number: int, point: Checkpoint) -> Generator[Event, None, Checkpoint]:
    """One round, from the sampling of its clients to the checkpoint after it."""
    started, prepared, record = time.perf_counter(), run.prepared, run.record
    settings = prepared.experiment.federation
    spool = run.folder / recovery.spool_name(number)
    close_to_others(spool)
    earlier = Accepted.from_json(point.accepted)
    collector = Collector(prepared, run.transport, number, point.state, spool, earlier=earlier)
    yield from collector.events(record)
    aggregating, of = time.perf_counter(), f"round {number}/{settings.rounds}"
    run.meter.begin(f"{of}: aggregating")
    uploads = [collector.uploads[id] for id in prepared.clients if id in collector.uploads]
    state, adapter, accepted = yield from _next(run, number, collector, uploads)
    aggregate_seconds = time.perf_counter() - aggregating
    run.meter.begin(f"{of}: writing the adapter")
    export(prepared.base, adapter, adapter_folder(run.folder, number), replace=True)
    yield record.append(
        "round",
        round=number,
        cohort=[id for id in prepared.clients if id in collector.invited],
        received=len(uploads),
        **_totals([client_facts(upload, prepared) for upload in uploads]),
        seconds=time.perf_counter() - started,
        aggregate_seconds=aggregate_seconds,
        # An exact sum: its order must not matter.
        update_norm=math.sqrt(math.fsum(norm(f) ** 2 for f in adapter.values())),
    )
    yield record.append("spectrum", round=number, **spectrum(prepared, adapter, state))
    yield from run.evaluations.after(number, adapter, state)
    run.meter.begin(f"{of}: clients evaluate")
    yield from of_clients(run.record, prepared, run.transport, number, adapter, state)
    run.meter.begin(f"{of}: writing the checkpoint")
    point = checkpoint.save(
        run.folder,
        number,
        record.mark(point.journal),
        state,
        point.identity,
        point.clients_at_once,
        accepted.to_json(),
    )
    run.meter.end()
    shutil.rmtree(spool)
    if prepared.experiment.run.keep_adapters == "last" and number > 1:
        shutil.rmtree(adapter_folder(run.folder, number - 1).parent, ignore_errors=True)
    return point


def _next(
    run: _Run, number: int, collector: Collector, uploads: Sequence[Upload]
) -> Generator[Event, None, tuple[State, Adapter, Accepted]]:
    """The state after these uploads, its global adapter, and the changes accepted until now.

    A state that does not meet the bounds of an upload is not used: the one before stays.
    """
    prepared, record, before = run.prepared, run.record, collector.state
    most, context = prepared.experiment.federation.most_share, prepared.context(number)
    cohort = cohort_of(prepared, before, uploads, number)
    limited = cohort.limited(most)
    if shares := _lowered(cohort, limited):
        yield record.append("limited", round=number, most_share=most, shares=shares)
    if facts := weights_facts(limited, uploads):
        yield record.append("weights", round=number, **facts)
    steps_freely = prepared.experiment.server_optimizer is not None
    try:
        after = _aggregated(run, before, limited, number)
        reason = result.fault(before, after, collector.screen.largest(uploads), steps_freely)
        adapter = prepared.method.global_adapter(after, context) if reason is None else None
    except (AdapterError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
        reason, adapter = f"It could not be computed: {error}", None
    if adapter is not None:
        return after, adapter, collector.screen.accepted(uploads)
    yield record.append("kept", round=number, reason=reason)
    return before, prepared.method.global_adapter(before, context), collector.earlier


def _lowered(before: Cohort, after: Cohort) -> dict[str, float]:
    """The shares that clients had before they were limited, of those that were."""
    if before.weights == after.weights:
        return {}
    shares = normalized(list(before.weights.values()))
    limits = after.weights
    return {
        id: share
        for share, (id, weight) in zip(shares, before.weights.items(), strict=True)
        if limits[id] < weight
    }


def _aggregated(run: _Run, state: State, cohort: Cohort, number: int) -> State:
    """The next state, with the help of workers where the transport has any for it."""
    prepared, context = run.prepared, run.prepared.context(number)
    if isinstance(run.transport, Aggregating):
        return run.transport.aggregate(prepared.method, state, cohort, context)
    return prepared.method.aggregate(state, cohort, context)


def _clients_at_once(prepared: PreparedRun) -> int:
    """How many clients train at a time in this process: as the config says, or measured."""
    runtime, shapes = prepared.runtime, prepared.base.shapes
    return prepared.experiment.run.clients_at_once or clients_at_once(
        prepared.base,
        runtime.store,
        (runtime.rows[id] for id in prepared.clients),
        runtime.training,
        sum(rank * sum(shapes[module]) for module, rank in prepared.ranks.items()),
        prepared.cohort_size,
    )


def _totals(clients: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    keys = ("examples", "tokens", "loss_total", "loss_tokens", "bytes_up", "bytes_down")
    return {key: sum(client[key] for client in clients) for key in keys}


def adapter_folder(folder: Path, number: int) -> Path:
    """Where the global adapter of a round lies."""
    return folder / "rounds" / f"{number:05d}" / "adapter"


def _sums(adapter: Path) -> dict[str, str]:
    """The SHA-256 of every file of an adapter that matters to those who load it."""
    return {name: sha256(adapter / name) for name in (CONFIG, WEIGHTS) if (adapter / name).exists()}
