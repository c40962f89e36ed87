"""Evaluations of the global adapter by the clients, on rows of their own that never train."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from flexlora import wire
from flexlora.errors import ProtocolError
from flexlora.federation.client_store import PRIVATE, ClientStore
from flexlora.federation.collect import recorded
from flexlora.federation.evaluations import personal_model
from flexlora.federation.holdout import HoldoutLoss, holdout_loss
from flexlora.federation.prepared import PreparedRun
from flexlora.federation.transport import (
    Evaluating,
    Lost,
    Query,
    QueryAnswer,
    Transport,
    WaitPolicy,
)
from flexlora.journal import Event, Record
from flexlora.lowrank import Adapter
from flexlora.method import Feature, State
from flexlora.storage.untrusted import one_line, short

MOST_COUNT = 10**12
"""No client has more rows or tokens."""
MOST_NATS = 1e6
"""No model's mean loss of a token is larger."""


@dataclass
class _Losses:
    """What the clients answered: losses by client, and why others have none."""

    by_client: dict[str, HoldoutLoss] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    bytes_down: int = 0


def of_clients(
    record: Record,
    prepared: PreparedRun,
    transport: Transport,
    number: int,
    adapter: Adapter,
    state: State,
) -> Iterator[Event]:
    """The global adapter after round ``number`` on the clients' held-out rows, when it is due.

    Round 0 stands for the base model. Of a method with personal models each client evaluates its
    own. In a simulation the clients' rows are here; else the clients are asked, and only their
    losses and numbers of rows return.
    """
    if not _is_due(prepared, number):
        return
    started = time.perf_counter()
    losses = _Losses()
    if prepared.local is not None:
        losses.by_client = _simulated(record, prepared, number, adapter, state)
    elif isinstance(transport, Evaluating):
        yield from _asked(record, prepared, transport, number, adapter, state, losses)
    if not losses.by_client and not losses.missing:
        return
    yield record.append(
        "client_evaluation",
        round=number,
        clients=[{"client": id, **asdict(loss)} for id, loss in sorted(losses.by_client.items())],
        missing=dict(sorted(losses.missing.items())),
        **spread(losses.by_client),
        seconds=time.perf_counter() - started,
        bytes_down=losses.bytes_down,
    )


def spread(losses: Mapping[str, HoldoutLoss]) -> dict[str, Any]:
    """The mean loss weighted by tokens, and how the clients' own means differ; None of nothing."""
    means = {id: loss.loss_total / loss.loss_tokens for id, loss in sorted(losses.items())}
    if not means:
        return dict.fromkeys(("loss", "loss_min", "loss_max", "loss_std", "worst"))
    total = math.fsum(loss.loss_total for loss in losses.values())
    return {
        "loss": total / sum(loss.loss_tokens for loss in losses.values()),
        "loss_min": min(means.values()),
        "loss_max": max(means.values()),
        "loss_std": statistics.pstdev(means.values()),
        "worst": max(means, key=lambda id: means[id]),
    }


def _is_due(prepared: PreparedRun, number: int) -> bool:
    settings = prepared.experiment.evaluation
    if not settings.client_share:
        return False
    if number == 0:
        return settings.base
    every, last = settings.client_every, number == prepared.experiment.federation.rounds
    return last or (every > 0 and number % every == 0)


def _simulated(
    record: Record, prepared: PreparedRun, number: int, adapter: Adapter, state: State
) -> dict[str, HoldoutLoss]:
    most = prepared.experiment.evaluation.client_rows
    personal = Feature.PERSONAL in prepared.method.features and number > 0
    store, losses = ClientStore(record.folder / PRIVATE), {}
    for id in prepared.clients:
        if id in prepared.runtime.holdout:
            model = personal_model(prepared, store, id, number + 1, state) if personal else adapter
            loss = holdout_loss(prepared.runtime, id, model, most)
            if loss.loss_tokens:
                losses[id] = loss
    return losses


def _asked(
    record: Record,
    prepared: PreparedRun,
    transport: Evaluating,
    number: int,
    adapter: Adapter,
    state: State,
    losses: _Losses,
) -> Iterator[Event]:
    """Ask the clients; fills ``losses`` and yields what else happened."""
    open_queries = set(transport.evaluators())
    if not open_queries:
        return
    most = prepared.experiment.evaluation.client_rows
    personal = Feature.PERSONAL in prepared.method.features and number > 0
    common = b"" if personal else wire.encode(adapter, {"kind": "adapter"}, torch.float32)

    def queries() -> Iterator[Query]:
        for id in sorted(open_queries):
            data = _download(prepared, id, number + 1, state) if personal else common
            losses.bytes_down += len(data)
            yield Query(id, number, data, {"rows": most, "personal": personal})

    seconds = prepared.experiment.federation.deadline_seconds
    for outcome in transport.evaluate(queries(), WaitPolicy(seconds)):
        if isinstance(outcome, QueryAnswer) and outcome.client in open_queries:
            open_queries.discard(outcome.client)
            try:
                losses.by_client[outcome.client] = _loss(outcome.facts)
            except ProtocolError as error:
                losses.missing[outcome.client] = str(error)
        elif isinstance(outcome, Lost):
            open_queries.discard(outcome.client)
            losses.missing[outcome.client] = one_line(outcome.reason)
        elif not isinstance(outcome, QueryAnswer):
            yield recorded(outcome, number, record)
    losses.missing |= dict.fromkeys(open_queries, "It did not answer.")


def _download(prepared: PreparedRun, id: str, round: int, state: State) -> bytes:
    """What a client would start a round from, for a method with personal models."""
    client = prepared.clients[id]
    download = prepared.method.handout(state, client, prepared.context(round))
    return wire.encode_download(download, prepared.wire_dtype)


def _loss(facts: Mapping[str, Any]) -> HoldoutLoss:
    """A client's answer, checked.

    Raises:
        ProtocolError: it is not a loss of rows.
    """
    counts: Any = [facts.get("examples"), facts.get("loss_tokens")]
    total: Any = facts.get("loss_total")
    if not all(type(count) is int and 1 <= count <= MOST_COUNT for count in counts):
        raise ProtocolError(f"It sent {short(counts)} as numbers of rows and tokens.")
    # NaN fails this comparison too.
    if type(total) not in (int, float) or not 0 <= total <= MOST_NATS * counts[1]:
        raise ProtocolError(f"It sent {short(total)} as a loss.")
    return HoldoutLoss(counts[0], float(total), counts[1])
