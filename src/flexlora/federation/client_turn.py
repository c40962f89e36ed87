"""One client's turn: from a download to an upload, the same in simulation and for real."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from flexlora import wire
from flexlora.data import TokenStore
from flexlora.federation.client_store import ClientStore
from flexlora.lowrank import Adapter
from flexlora.method import Download, Fresh, Method, Upload, chosen_of, stacked
from flexlora.model import Base
from flexlora.seeds import rng
from flexlora.training import ClientTask, Trained, Training, train_together

FACTS = ("tokens", "computed", "steps", "loss_total", "loss_tokens", "seconds", "bytes_down")
"""What a turn tells the journal: totals, in tokens, steps, nats, seconds and bytes.

``computed`` are the tokens that went through the model, those shared by examples once."""


@dataclass(frozen=True)
class TurnRequest:
    """What the server asks of one client in one round.

    ``download`` is as it travels, or the file that holds it: then the adapter is read module
    by module, and is in memory once, as the parameters in training.
    """

    client: str
    round: int
    download: bytes | Path

    @property
    def bytes_down(self) -> int:
        """What the download weighs."""
        held = self.download
        return held.stat().st_size if isinstance(held, Path) else len(held)

    def opened(self) -> Download:
        """What the client starts from, in the numbers that it travelled in."""
        if isinstance(self.download, Path):
            return wire.open_download(self.download)
        return wire.decode_download(self.download)


@dataclass(frozen=True)
class ClientRuntime:
    """What a client's machine has: the base model, tokens, its rows, and the run's terms.

    ``private`` is where it keeps what never travels; None where a method keeps nothing.
    """

    base: Base
    store: TokenStore
    rows: Mapping[str, Sequence[int]]
    method: Method
    training: Training
    wire_dtype: torch.dtype
    seed: int
    private: ClientStore | None = None

    def fresh(self, job: TurnRequest) -> Fresh:
        """Where this job's fresh adapters come from."""
        return Fresh(self.base.shapes, self.seed, job.client, job.round)

    def kept(self, job: TurnRequest) -> Adapter | None:
        """What the job's client kept of its last turn."""
        return self.private.kept(job.client, job.round) if self.private else None


def turn(job: TurnRequest, here: ClientRuntime) -> bytes:
    """One client's turn; see ``turns``."""
    return turns([job], here)[0]


def turns(jobs: Sequence[TurnRequest], here: ClientRuntime) -> list[bytes]:
    """Train clients at the same time, each on its own rows; their uploads as they travel.

    All randomness is that of (seed, client, round). Precision is the wire's at both ends
    and float32 in between. Who else is trained changes a client's numbers by rounding only.
    """
    rounds = {job.round for job in jobs}
    if not jobs:
        return []
    if len(rounds) != 1:
        raise ValueError(f"Clients train together in one round, not in {sorted(rounds)}.")
    merged = _merged(jobs, here)
    beside = [] if here.base.folds else merged
    with here.base.folded([] if beside else merged):
        probes = _probed(jobs, here, beside) if here.method.probes else [None] * len(jobs)
        learners = [
            _learner(job, here, _start(job, here, probe), beside)
            for job, probe in zip(jobs, probes, strict=True)
        ]
        trained = train_together(here.base, learners, here.store, here.training, rounds.pop())
    del learners
    return [
        _upload(job, here, probe, done)
        for job, probe, done in zip(jobs, probes, trained, strict=True)
    ]


@dataclass(frozen=True)
class Probe:
    """The terms that a client chose, and what the probing epoch took."""

    terms: Mapping[str, Sequence[int]]
    trained: Trained


def _merged(jobs: Sequence[TurnRequest], here: ClientRuntime) -> list[Adapter]:
    """All that the clients' common base has merged, with what these downloads bring.

    Raises:
        ValueError: there is something to merge and nowhere to keep it.
        Forgotten: what was merged before is not there.
    """
    if here.private is None:
        if any(job.opened().merge for job in jobs):
            raise ValueError(
                f"Method {here.method.title!r} merges updates for good; the workplace has no "
                "private folder to keep them in."
            )
        return []
    for job in jobs:
        download = job.opened()
        here.private.merge(download.merge, download.held)
    return here.private.merged(jobs[0].round)


def _start(job: TurnRequest, here: ClientRuntime, probe: Probe | None = None) -> Download:
    """The job's download, completed on the client; of a probing method, cut to its choice."""
    start = here.method.receive(job.opened(), here.kept(job), here.fresh(job))
    return start if probe is None else chosen_of(start, probe.terms)


def _learner(
    job: TurnRequest,
    here: ClientRuntime,
    start: Download,
    beside: Sequence[Adapter],
    turn: str = "client",
) -> ClientTask:
    """Who trains what; what the base has merged and cannot hold itself is seen beside it."""
    frozen = [*beside, *([] if start.rest is None else [start.rest])]
    return ClientTask(
        f"client {job.client!r}",
        start.adapter,
        here.rows[job.client],
        rng(here.seed, turn, job.client, job.round),
        lambda now, _: here.method.penalty(now, start),
        stacked(frozen) if frozen else None,
        start.halves,
        start.rate,
        here.method.form(start),
        _scale_ranks(start),
    )


def _scale_ranks(start: Download) -> dict[str, int] | None:
    """The ranks of the whole adapter of which numbered terms are trained, the rest beside them.

    Its terms have one scale, however many of them a client trains.
    """
    if not start.terms or start.rest is None:
        return None
    return {m: f.rank + start.rest[m].rank for m, f in start.adapter.items()}


def _probed(
    jobs: Sequence[TurnRequest], here: ClientRuntime, beside: Sequence[Adapter]
) -> list[Probe | None]:
    """What each client chooses to train, after an epoch on all it was handed."""
    starts = [_start(job, here) for job in jobs]
    learners = [
        _learner(job, here, start, beside, "probe") for job, start in zip(jobs, starts, strict=True)
    ]
    once = replace(here.training, epochs=1)
    trained = train_together(here.base, learners, here.store, once, jobs[0].round)
    return [
        Probe(here.method.choose(start, done.adapter), done)
        for start, done in zip(starts, trained, strict=True)
    ]


def _upload(job: TurnRequest, here: ClientRuntime, probe: Probe | None, trained: Trained) -> bytes:
    """What a client sends of its training; what it keeps goes to its own disk.

    Tokens and seconds are those of a probing epoch too; losses and steps are not.
    """
    facts = {name: getattr(trained, name) for name in FACTS if name != "bytes_down"}
    facts["bytes_down"] = job.bytes_down
    if probe is not None:
        for name in ("tokens", "computed", "seconds"):
            facts[name] += getattr(probe.trained, name)
    # The start is read again, not held in memory while training.
    start = _start(job, here, probe)
    numbers = {**start.facts, "steps": trained.steps, "round": job.round}
    start = replace(start, adapter=start.adapter.to(torch.float32), facts=numbers)
    kept = here.method.keeps(start, trained.adapter)
    if kept is not None:
        if here.private is None:
            raise ValueError(
                f"Method {here.method.title!r} keeps a part of the adapter on the client; the "
                "workplace has no private folder for it."
            )
        here.private.keep(job.client, job.round, kept)
    returned = here.method.shares(start, trained.adapter)
    examples = len(here.rows[job.client])
    upload = Upload(job.client, job.round, returned, examples, facts, start.terms)
    return wire.encode_upload(upload, here.wire_dtype, here.method.sparse)
