"""What a run would do and cost, measured on one local step of each rank type and a few answers."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from flexlora.data import Tokens
from flexlora.evaluation import evaluate_each
from flexlora.federation.client_store import PRIVATE, ClientStore
from flexlora.federation.client_turn import turn
from flexlora.federation.collect import turn_requests
from flexlora.federation.prepared import PreparedRun
from flexlora.storage import scratch

_ANSWERS = 4
"""How many test rows are evaluated to estimate the time of an evaluation."""


@dataclass(frozen=True)
class TypeCost:
    """Clients of one rank type: their number, and what one of them costs in a round.

    ``ranks`` are the different ranks of its modules, ``examples`` the smallest and the largest
    number of training rows of a client, ``steps`` the same of its optimizer steps. Bytes are
    those of the first round's messages as they are encoded; ``step_seconds`` is one local step.
    """

    name: str
    clients: int
    ranks: Sequence[int]
    examples: tuple[int, int]
    steps: tuple[int, int]
    mean_steps: float
    bytes_up: int
    bytes_down: int
    step_seconds: float


@dataclass(frozen=True)
class Rehearsal:
    """The cost of a run as an estimate: of an average round, and of one evaluation.

    ``cohort`` is how many uploads a round wants. Seconds leave out the server's step and the
    reading of the model; they assume that clients train one after the other.
    """

    types: Sequence[TypeCost]
    cohort: int
    rounds: int
    evaluations: int
    evaluation_seconds: float

    @property
    def bytes_up(self) -> float:
        """Bytes that an average round sends to the server."""
        return self._mean([each.bytes_up for each in self.types])

    @property
    def bytes_down(self) -> float:
        """Bytes that an average round sends to its clients."""
        return self._mean([each.bytes_down for each in self.types])

    @property
    def round_seconds(self) -> float:
        """The local training of an average round."""
        return self._mean([each.mean_steps * each.step_seconds for each in self.types])

    @property
    def seconds(self) -> float:
        """The whole run."""
        return self.rounds * self.round_seconds + self.evaluations * self.evaluation_seconds

    def _mean(self, values: Sequence[float]) -> float:
        clients = [each.clients for each in self.types]
        return self.cohort * float(np.average(values, weights=clients))


def rehearse(prepared: PreparedRun) -> Rehearsal:
    """Train one step with one client of each rank type, and answer a few test rows.

    Nothing is kept. Costs some seconds for a small model, and the memory of a run with one
    client at a time.

    Raises:
        DataError: a client's loss is not finite.
        ConfigError: as in the evaluation of a run.
    """
    federation = prepared.experiment.federation
    with scratch() as folder:
        types = list(_types(prepared, folder))
    return Rehearsal(
        types,
        min(prepared.cohort_size, len(prepared.clients)),
        federation.rounds,
        *_evaluation(prepared),
    )


def sample_tokens(prepared: PreparedRun, count: int) -> list[tuple[str, Tokens]]:
    """Training rows with their clients' names: one of each of the first clients, or of one more."""
    runtime = prepared.runtime
    rows = [(id, list(runtime.rows[id])) for id in list(prepared.clients)[:count]]
    firsts = [(id, own[place]) for place in range(count) for id, own in rows if place < len(own)]
    return [(id, runtime.store[int(row)]) for id, row in firsts[:count]]


def _types(prepared: PreparedRun, folder: Path) -> Iterator[TypeCost]:
    training = prepared.experiment.training
    one_step = replace(training, max_steps=1, epochs=1)
    changed = prepared.with_runtime(training=one_step, clients=ClientStore(folder / PRIVATE))
    state, warm = prepared.method.start(prepared.fresh(), prepared.context(0)), False
    for name, ranks in prepared.clients.kinds.items():
        of_type = [c for c in prepared.clients.values() if c.rank_type == name]
        examples = [client.examples for client in of_type]
        steps = [training.steps(count) for count in examples]
        (request,) = turn_requests(prepared, 1, state, [of_type[0].id], folder / "downloads")
        if not warm:
            turn(request, changed.runtime)  # the first step of a process takes longer
            warm = True
        started = time.perf_counter()
        upload = turn(request, changed.runtime)
        yield TypeCost(
            name,
            len(of_type),
            sorted(set(ranks.values())),
            (min(examples), max(examples)),
            (min(steps), max(steps)),
            float(np.mean(steps)),
            len(upload),
            request.bytes_down,
            time.perf_counter() - started,
        )


def _evaluation(prepared: PreparedRun) -> tuple[int, float]:
    """How many evaluations there will be, each of one adapter, and the seconds of one."""
    settings, rounds = prepared.experiment.evaluation, prepared.experiment.federation.rounds
    questions = prepared.questions[:_ANSWERS]
    if not questions:
        return 0, 0.0
    due = {rounds, *(range(settings.every, rounds + 1, settings.every) if settings.every else ())}
    largest = dict(prepared.ranks)
    kinds = prepared.clients.kinds.values()
    truncated = sum(dict(ranks) != largest for ranks in kinds) if settings.truncated else 0
    started = time.perf_counter()
    evaluate_each(prepared.base, [{}], questions, prepared.prompt, settings)
    seconds = (time.perf_counter() - started) * len(prepared.questions) / len(questions)
    return settings.base + len(due) + truncated, seconds
