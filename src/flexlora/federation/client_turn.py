"""One client's round: from a download to an upload, the same in simulation and for real."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from flexlora import wire
from flexlora.data import TokenStore
from flexlora.errors import ConfigError
from flexlora.federation.client_store import ClientStore
from flexlora.lowrank import Adapter
from flexlora.method import (
    Download,
    Feature,
    FreshAdapters,
    Method,
    Turn,
    Upload,
    stacked,
    with_components,
)
from flexlora.model import Base
from flexlora.seeds import rng
from flexlora.training import ClientTask, EachStep, Trained, Training, train_together

METRICS = ("tokens", "computed", "steps", "loss_total", "loss_tokens", "seconds", "bytes_down")
"""What an upload tells the journal: totals, in tokens, steps, nats, seconds and bytes.

``computed`` are the tokens that went through the model, those shared by examples once."""


@dataclass(frozen=True)
class TurnRequest:
    """What the server sends to one client in one round.

    ``download`` is as it travels, or the file that has it: then the adapter is read module
    by module, and is in memory once, as the parameters in training. ``most_bytes_up`` is the
    largest number of bytes that the upload can have: a transport need not take more. None where
    nobody has to know, as on the client.
    """

    client: str
    round: int
    download: bytes | Path
    most_bytes_up: int | None = None

    @property
    def bytes_down(self) -> int:
        """The size of the download."""
        data = self.download
        return data.stat().st_size if isinstance(data, Path) else len(data)

    def opened(self) -> Download:
        """What the client starts from, in the dtype in which it travelled."""
        if isinstance(self.download, Path):
            return wire.open_download(self.download)
        return wire.decode_download(self.download)


@dataclass(frozen=True)
class ClientRuntime:
    """What a client's machine has: the base model, tokens, its rows, and the run's settings.

    ``clients`` is where it keeps what never travels; None where a method keeps nothing.
    ``holdout`` has the rows that a client never trains on; only clients that have some are in it.
    ``each_step`` is called before each step of local training, and may end it by an exception.
    """

    base: Base
    store: TokenStore
    rows: Mapping[str, Sequence[int]]
    method: Method
    training: Training
    wire_dtype: torch.dtype
    seed: int
    clients: ClientStore | None = None
    holdout: Mapping[str, Sequence[int]] = field(default_factory=dict)
    each_step: EachStep | None = None

    def start(self, request: TurnRequest, probe: Probe | None = None) -> Download:
        """The request's download, completed on the client; after a probe, cut to its choice."""
        fresh = FreshAdapters(self.base.shapes, self.seed, request.client, request.round)
        private = self.clients.private(request.client, request.round) if self.clients else {}
        start = self.method.prepare(request.opened(), private, fresh)
        return start if probe is None else with_components(start, probe.component_ids)


@dataclass(frozen=True)
class Probe:
    """The components that a client has selected, and what its probing epoch took."""

    component_ids: Mapping[str, Sequence[int]]
    trained: Trained


def turn(request: TurnRequest, runtime: ClientRuntime) -> bytes:
    """One client's local training; see ``turns``."""
    return turns([request], runtime)[0]


def turns(requests: Sequence[TurnRequest], runtime: ClientRuntime) -> list[bytes]:
    """Train clients at the same time, each on its own rows; their uploads as they travel.

    All randomness is that of (seed, client, round). Precision is the wire's at both ends
    and float32 in between. Which others are trained changes a client's numbers by rounding only.
    """
    rounds = {request.round for request in requests}
    if not requests:
        return []
    if len(rounds) != 1:
        raise ValueError(f"Clients train together in one round, not in {sorted(rounds)}.")
    updates = _base_updates(requests, runtime)
    beside = [] if runtime.base.folds else updates
    with runtime.base.folded([] if beside else updates):
        probes: list[Probe | None] = [None] * len(requests)
        if Feature.PROBES in runtime.method.features:
            probes = _probed(requests, runtime, beside)
        tasks = [
            _task(request, runtime, runtime.start(request, probe), beside)
            for request, probe in zip(requests, probes, strict=True)
        ]
        trained = _trained(runtime, tasks, runtime.training, rounds.pop())
    del tasks
    return [
        _upload(request, runtime, probe, result)
        for request, probe, result in zip(requests, probes, trained, strict=True)
    ]


def _base_updates(requests: Sequence[TurnRequest], runtime: ClientRuntime) -> list[Adapter]:
    """All updates that the clients' common base has merged, these downloads' included.

    Raises:
        ConfigError: there is something to merge and nowhere to keep it.
        LostBase: what was merged before is not there.
    """
    if runtime.clients is None:
        if any(request.opened().base_updates for request in requests):
            raise ConfigError(
                f"Method {runtime.method.title!r} merges updates for good; this client has no "
                "folder to keep them in."
            )
        return []
    for request in requests:
        download = request.opened()
        shapes = runtime.base.shapes
        runtime.clients.add_updates(download.base_updates, download.base_rounds, shapes)
    return runtime.clients.updates_before(requests[0].round)


def _task(
    request: TurnRequest,
    runtime: ClientRuntime,
    start: Download,
    beside: Sequence[Adapter],
    purpose: str = "client",
) -> ClientTask:
    """What one client trains; base updates that the base itself cannot hold stand beside it."""
    frozen = [*beside, *([] if start.frozen is None else [start.frozen])]
    return ClientTask(
        f"client {request.client!r}",
        start.adapter,
        runtime.rows[request.client],
        rng(runtime.seed, purpose, request.client, request.round),
        lambda current, _: runtime.method.penalty(current, start),
        stacked(frozen) if frozen else None,
        start.factors,
        start.learning_rate_factor,
        runtime.method.parametrize(start),
        _scale_ranks(start),
    )


def _trained(
    runtime: ClientRuntime, tasks: Sequence[ClientTask], settings: Training, round: int
) -> list[Trained]:
    return train_together(
        runtime.base, tasks, runtime.store, settings, round, each_step=runtime.each_step
    )


def _scale_ranks(start: Download) -> dict[str, int] | None:
    """The ranks of the whole adapter of which numbered components are trained, the others frozen.

    Its components have one LoRA scale, however many of them a client trains.
    """
    if not start.component_ids or start.frozen is None:
        return None
    return {m: f.rank + start.frozen[m].rank for m, f in start.adapter.items()}


def _probed(
    requests: Sequence[TurnRequest], runtime: ClientRuntime, beside: Sequence[Adapter]
) -> list[Probe | None]:
    """What each client selects to train, after an epoch on its whole download."""
    starts = [runtime.start(request) for request in requests]
    tasks = [
        _task(request, runtime, start, beside, "probe")
        for request, start in zip(requests, starts, strict=True)
    ]
    one_epoch = replace(runtime.training, epochs=1)
    trained = _trained(runtime, tasks, one_epoch, requests[0].round)
    return [
        Probe(runtime.method.select(start, result.adapter), result)
        for start, result in zip(starts, trained, strict=True)
    ]


def _upload(
    request: TurnRequest, runtime: ClientRuntime, probe: Probe | None, trained: Trained
) -> bytes:
    """What a client sends of its training; what it keeps goes to its own disk.

    Tokens and seconds are those of a probing epoch too; losses and steps are not.
    """
    metrics = {name: getattr(trained, name) for name in METRICS if name != "bytes_down"}
    metrics["bytes_down"] = request.bytes_down
    if probe is not None:
        for name in ("tokens", "computed", "seconds"):
            metrics[name] += getattr(probe.trained, name)
    # The start is read again, not held in memory while training.
    start = runtime.start(request, probe)
    start = replace(start, adapter=start.adapter.to(torch.float32))
    turn = Turn(start, trained.adapter, trained.steps, request.round)
    method = runtime.method
    if private := method.private_from(turn):
        if runtime.clients is None:
            raise ConfigError(
                f"Method {method.title!r} keeps a part of the adapter on the client; this client "
                "has no folder for it."
            )
        runtime.clients.keep(request.client, request.round, private)
    upload = Upload(
        request.client,
        request.round,
        method.upload_from(turn),
        len(runtime.rows[request.client]),
        metrics,
        start.component_ids,
        method.aux_from(turn),
    )
    sparse = Feature.SPARSE_MESSAGES in method.features
    return wire.encode_upload(upload, runtime.wire_dtype, sparse)
