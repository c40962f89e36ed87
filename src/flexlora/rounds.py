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
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from flexlora import aggregation, checkpoint, peft_directory, sampling, validate, wire
from flexlora.adapter import Adapter, Factors
from flexlora.checkpoint import Checkpoint
from flexlora.client import FACTS, Job
from flexlora.config import Experiment
from flexlora.experiment import Ready
from flexlora.federation import Aggregating, Federation, Lost, News, Patience, Reply, Stray
from flexlora.federations.simulated import Simulated
from flexlora.linalg import LowRankSum, norm
from flexlora.method import Client, Draw, Fresh, Method, State, Upload
from flexlora.private import Private
from flexlora.record import Event, Record
from flexlora.seeds import rng
from flexlora.task import evaluate_each
from flexlora.training.together import clients_at_once

PRIVATE = "private"
"""Where in the run's folder the simulated clients keep what never travels."""

SPECTRA = 6
"""Of how many modules the journal keeps all singular values; of the others, block shares."""


def run(
    ready: Ready, folder: Path, federation: Federation | None = None, resume: bool = False
) -> Iterator[Event]:
    """Run the federation in ``folder``, yielding every event as it enters the journal.

    A run can be stopped anywhere, also by a kill, and goes on with ``resume`` from its last
    checkpoint and the uploads received since; the adapters are then the same to the bit.

    Raises:
        ValueError: there is nothing to resume or it was another experiment, the folder holds
            a run already, or nobody returned a usable upload in a round.
    """
    started = time.perf_counter()
    record = Record(folder)
    experiment = ready.experiment
    identity = _identity(experiment)
    if resume:
        point = checkpoint.load(folder)
        if point.identity != identity:
            raise ValueError(
                f"The run in {folder} was started with another config; only federation.rounds "
                "and the run section may change when it goes on."
            )
        _sweep(folder, point)
        record.rewind(point.journal_bytes)
    elif (folder / checkpoint.POINTER).exists():
        raise ValueError(f"{folder} already holds a run; resume it, or give another folder.")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        together = federation.together if federation else _together(ready)
        # No name for the first state: it would stay in memory as long as the run.
        start = ready.method.start
        point = checkpoint.save(folder, 0, 0, start(ready.fresh()), identity, together)
    if federation is None:
        here = replace(ready.workplace, private=Private(folder / PRIVATE))
        federation = Simulated(here, point.together)
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
    record: Record, ready: Ready, federation: Federation, number: int, point: Checkpoint
) -> Generator[Event, None, Checkpoint]:
    """One round, from the picking of its clients to the checkpoint after it."""
    started, folder = time.perf_counter(), record.folder
    spool = folder / f"uploads-{number:05d}"
    spool.mkdir(exist_ok=True)
    asking = _Asking(ready, federation, number, point.state, spool)
    yield from asking.events(record)
    aggregating = time.perf_counter()
    in_order = [asking.uploads[id] for id in ready.clients if id in asking.uploads]
    state = _aggregated(ready.method, federation, asking.state, in_order)
    adapter = ready.method.update(state)
    seconds = time.perf_counter() - aggregating
    _export(ready, adapter, adapter_folder(folder, number))
    yield record.append(
        "round",
        round=number,
        cohort=[id for id in ready.clients if id in asking.asked],
        received=len(in_order),
        **_totals([_facts_of(upload, ready) for upload in in_order]),
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
    method: Method, federation: Federation, state: State, uploads: Sequence[Upload]
) -> State:
    """The next state, with the help of workers where the federation has any for it."""
    if isinstance(federation, Aggregating):
        return federation.aggregate(method, state, uploads)
    return method.aggregate(state, uploads)


def _together(ready: Ready) -> int:
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


@dataclass
class _Asking:
    """The asking of one round: who was asked, and what came back that is of use."""

    ready: Ready
    federation: Federation
    number: int
    state: State
    spool: Path
    asked: set[str] = field(default_factory=set)
    uploads: dict[str, Upload] = field(default_factory=dict)

    @property
    def wanted(self) -> int:
        """How many uploads the round goes on with at once."""
        return min(self.ready.cohort_size, len(self.ready.clients))

    def events(self, record: Record) -> Iterator[Event]:
        """Ask until the quorum is there, or nothing is left to try; what happened.

        Raises:
            ValueError: too few clients returned a usable upload.
        """
        how = self.ready.experiment.federation
        for attempt in range(1, how.attempts + 1):
            for found in self._received(self._cohort(attempt)):
                yield self._recorded(found, record)
            if len(self.uploads) >= how.quorum:
                return
            if how.attempts > 1:
                facts = {"received": len(self.uploads), "quorum": how.quorum}
                yield record.append("short", round=self.number, attempt=attempt, **facts)
        raise ValueError(
            f"{len(self.uploads)} of {len(self.asked)} clients of round {self.number} returned a "
            f"usable upload after {how.attempts} attempts; federation.quorum is {how.quorum}. "
            f"Asked: {sorted(self.asked)[:20]}. Their reasons are in the journal; go on by "
            "resuming the run."
        )

    def _recorded(self, found: Upload | Lost | Stray | News, record: Record) -> Event:
        if isinstance(found, Upload):
            self.uploads[found.client] = found
            return record.append("client", **_facts_of(found, self.ready))
        if isinstance(found, News):
            return record.append(found.event, round=self.number, **found.facts)
        if isinstance(found, Lost) and found.forgot:
            self.state = aggregation.forgotten(self.state, found.client)
        kind = "lost" if isinstance(found, Lost) else "stray"
        return record.append(kind, round=self.number, client=found.client, reason=found.reason)

    def _cohort(self, attempt: int) -> list[str]:
        """Whom an attempt asks, in the clients' order: of those present that have not answered."""
        how = self.ready.experiment.federation
        present = self.federation.present(list(self.ready.clients))
        open_ = [id for id in present if id not in self.uploads]
        # As many more as the share says, without losing a client to rounding.
        size = math.ceil((self.wanted - len(self.uploads)) * (1 + how.over_selection) - 1e-9)
        again = (attempt,) if attempt > 1 else ()
        draw = rng(self.ready.experiment.seed, "cohort", self.number, *again)
        cohort = sampling.cohort(open_, size, draw) if open_ else []
        self.asked |= set(cohort)
        return cohort

    def _received(self, cohort: list[str]) -> Iterator[Upload | Lost | Stray | News]:
        """The uploads of a cohort: those already on the disk, then the others' as they come.

        Every upload is written to the disk before it is looked at, so that none is trained
        twice after a crash and none is held in memory.
        """
        waiting: list[str] = []
        # The longest first: with several at work, none is left for the end alone.
        order = sorted(cohort, key=lambda id: (-self.ready.clients[id].examples, id))
        for start in range(0, len(order), self.federation.together):
            group = order[start : start + self.federation.together]
            if all(self._place(id).exists() for id in group):
                yield from map(self._checked, group)
            else:
                # Together or not at all: numbers of clients trained together differ by rounding
                # from those trained in other company, and a resumed run is the same to the bit.
                waiting += group

        seconds = self.ready.experiment.federation.deadline_seconds
        jobs = _jobs(self.ready, self.number, self.state, tuple(waiting), self.spool / "downloads")
        for reply in self.federation.exchange(jobs, Patience(seconds, self._enough)):
            if isinstance(reply, Stray | News):
                yield reply
            elif reply.client not in waiting:
                yield Stray(reply.client, "It was not asked, or had answered already.")
            else:
                waiting.remove(reply.client)
                yield reply if isinstance(reply, Lost) else self._kept(reply)
        why = "It was not needed any more." if self._enough() else "It did not answer."
        yield from (Lost(id, why) for id in waiting)

    def _enough(self) -> bool:
        return len(self.uploads) >= self.wanted

    def _kept(self, reply: Reply) -> Upload | Lost:
        checkpoint.write(self._place(reply.client), reply.data)
        return self._checked(reply.client)

    def _place(self, id: str) -> Path:
        # A client's name may be anything; its hash is a file name everywhere.
        return self.spool / f"{hashlib.sha256(id.encode()).hexdigest()[:32]}.safetensors"

    def _checked(self, id: str) -> Upload | Lost:
        """A client's upload, if it is what was asked for; a client that sent else is lost."""
        ready, path = self.ready, self._place(id)
        try:
            client, upload = ready.clients[id], wire.open_upload(path)
            validate.upload(
                upload,
                client,
                self.number,
                ready.method.expects(self.state, client, ready.shapes),
                most_examples=client.examples,
            )
            if missing := [name for name in FACTS if name not in upload.facts]:
                raise ValueError(f"The upload of client {id!r} does not say its {missing}.")
        except ValueError as error:
            path.unlink()
            return Lost(id, str(error))
        return replace(upload, facts={**upload.facts, "bytes_up": path.stat().st_size})


def _jobs(
    ready: Ready, number: int, state: State, clients: Sequence[str], folder: Path
) -> Iterator[Job]:
    """The jobs of these clients, made one at a time, when they are asked for.

    Where a method hands out by rank alone, a download is made once for all clients of the
    same ranks and lies on the disk.
    """

    def made(id: str) -> bytes:
        client = ready.clients[id]
        download = ready.method.handout(state, client, _draw(ready, number))
        download = replace(download, held=aggregation.held(state, client))
        return wire.encode_download(download, ready.wire_dtype, ready.method.sparse)

    if not ready.method.by_rank_alone:
        yield from (Job(id, number, made(id)) for id in clients)
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    files: dict[str, Path] = {}
    for id in clients:
        kind = ready.clients[id].rank_type
        if kind not in files:
            files[kind] = folder / f"{len(files)}.safetensors"
            files[kind].write_bytes(made(id))
        yield Job(id, number, files[kind])


def _draw(ready: Ready, number: int) -> Draw:
    """The randomness of a round's handouts."""
    return lambda name: rng(ready.experiment.seed, "handout", number, name)


def _facts_of(upload: Upload, ready: Ready) -> dict[str, Any]:
    facts = {name: upload.facts[name] for name in (*FACTS, "bytes_up")}
    return {
        "round": upload.round,
        "client": upload.client,
        "rank_type": ready.clients[upload.client].rank_type,
        "examples": upload.examples,
        **facts,
    }


def _totals(clients: list[dict[str, Any]]) -> dict[str, Any]:
    keys = ("examples", "tokens", "loss_total", "loss_tokens", "bytes_up", "bytes_down")
    return {key: sum(client[key] for client in clients) for key in keys}


def _spectrum(ready: Ready, adapter: Adapter, state: State) -> dict[str, Any]:
    """How the global adapter's energy lies in the blocks between the clients' ranks.

    The last block is what the aggregate held beyond the largest rank, and so lost.
    """
    levels = sorted({rank for ranks in ready.clients.kinds.values() for rank in ranks.values()})
    lost = state.facts.get("step_lost_energy", state.facts.get("lost_energy", {}))
    shown = set(list(adapter)[:: max(len(adapter) // SPECTRA + 1, 1)])
    energy, values = {}, {}
    for module, factors in adapter.items():
        S = LowRankSum.of([(1.0, factors)]).svd(0).S
        kept = 1 - lost.get(module, 0.0)
        squares = (S.square() / S.square().sum().clamp_min(1e-300) * kept).tolist()
        edges = [0, *levels, len(squares)]
        blocks = [sum(squares[a:b]) for a, b in itertools.pairwise(edges)]
        energy[module] = [*blocks[:-1], blocks[-1] + 1 - kept]
        if module in shown:
            values[module] = [float(f"{value:.5g}") for value in S.tolist()]
    return {"rank_levels": levels, "energy": energy, "values": values}


def _evaluations(
    record: Record, ready: Ready, number: int, adapter: Adapter, state: State
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
    record: Record, ready: Ready, number: int, adapters: Mapping[str, Mapping[str, Factors]]
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


def _evaluated_at_home(record: Record, ready: Ready, number: int, state: State) -> Iterator[Event]:
    """Every client's questions answered by its own model; one event, as of a global one."""
    started = time.perf_counter()
    private, rows = Private(record.folder / PRIVATE), []
    asked = itertools.groupby(ready.questions, lambda question: question.client)
    for id, questions in asked:
        ranks = ready.clients[id].ranks if id in ready.clients else ready.largest
        client = Client(id, ranks, "", 1)
        handed = ready.method.handout(state, client, _draw(ready, number + 1))
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


def _export(ready: Ready, adapter: Adapter, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    peft_directory.write(adapter, target, base_model=ready.base.published, replace=True)


def _start_facts(ready: Ready, resume: bool) -> dict[str, Any]:
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
