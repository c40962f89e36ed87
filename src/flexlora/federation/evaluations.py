"""The evaluations of a run: of the base, of the global adapter, of each client's own model."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping

from flexlora.evaluation import evaluate_each
from flexlora.federation.client_store import PRIVATE, ClientStore
from flexlora.federation.prepared import PreparedRun
from flexlora.journal import Event, Record
from flexlora.lowrank import Adapter, Factors
from flexlora.method import Client, Feature, FreshAdapters, State


def of_base(record: Record, prepared: PreparedRun) -> Iterator[Event]:
    """The untouched base, before the first round."""
    yield from _evaluated(record, prepared, 0, {"base": {}})


def evaluations(
    record: Record, prepared: PreparedRun, number: int, adapter: Adapter, state: State
) -> Iterator[Event]:
    """The global adapter when a round evaluates it; at the end also truncated to each rank type.

    Of a method with personal models each client's own model answers the client's questions.
    """
    settings, last = prepared.experiment.evaluation, number == prepared.experiment.federation.rounds
    is_due = last or (settings.every > 0 and number % settings.every == 0)
    if Feature.PERSONAL in prepared.method.features:
        if is_due:
            yield from _of_personal_models(record, prepared, number, state)
        return
    adapters = {}
    if is_due:
        adapters["global"] = adapter
    if last and settings.truncated:
        for name, ranks in prepared.clients.kinds.items():
            if dict(ranks) != dict(prepared.ranks):
                adapters[name] = adapter.only(ranks).first(ranks)
    yield from _evaluated(record, prepared, number, adapters)


def _evaluated(
    record: Record,
    prepared: PreparedRun,
    number: int,
    adapters: Mapping[str, Mapping[str, Factors]],
) -> Iterator[Event]:
    """These adapters side by side; each event has an equal part of the seconds."""
    if not prepared.questions or not adapters:
        return
    started = time.perf_counter()
    settings = prepared.experiment.evaluation
    scores = evaluate_each(
        prepared.base, list(adapters.values()), prepared.questions, prepared.prompt, settings
    )
    seconds = (time.perf_counter() - started) / len(adapters)
    for name, rows in zip(adapters, scores, strict=True):
        yield record.append("evaluation", round=number, adapter=name, seconds=seconds, clients=rows)


def _of_personal_models(
    record: Record, prepared: PreparedRun, number: int, state: State
) -> Iterator[Event]:
    """Every client's questions answered by its own model; one event, as of a global one."""
    started = time.perf_counter()
    store, rows = ClientStore(record.folder / PRIVATE), []
    settings = prepared.experiment.evaluation
    for id, questions in itertools.groupby(prepared.questions, lambda question: question.client):
        model = _personal_model(prepared, store, id, number + 1, state)
        rows += evaluate_each(prepared.base, [model], list(questions), prepared.prompt, settings)[0]
    seconds = time.perf_counter() - started
    if rows:
        yield record.append(
            "evaluation", round=number, adapter="global", seconds=seconds, clients=rows
        )


def _personal_model(
    prepared: PreparedRun, store: ClientStore, id: str, round: int, state: State
) -> Adapter:
    """What a client would start the next round from; a held-out client at the largest ranks."""
    ranks = prepared.clients[id].ranks if id in prepared.clients else prepared.ranks
    client, method = Client(id, ranks, "", 1), prepared.method
    download = method.handout(state, client, prepared.context(round))
    fresh = FreshAdapters(prepared.base.shapes, prepared.experiment.seed, id, round)
    return method.prepare(download, store.private(id, round), fresh).adapter
