"""The evaluations of a run: of the base, of the global adapter, of each client's own model."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flexlora.evaluation import Answer, evaluate_with_answers, sample
from flexlora.federation.client_store import PRIVATE, ClientStore
from flexlora.federation.prepared import PreparedRun
from flexlora.journal import Event, Meter, Record, SampleAnswers
from flexlora.lowrank import Adapter, Factors
from flexlora.method import Client, Feature, FreshAdapters, State

_LONGEST_TEXT = 2000
"""Characters of a prompt and of a reference that are kept with an answer."""


@dataclass(frozen=True)
class Evaluations:
    """The evaluations of one run: their scores enter ``record``, sample answers a file beside it.

    ``meter`` counts the answers while an evaluation lasts.
    """

    prepared: PreparedRun
    record: Record
    meter: Meter

    def of_base(self) -> Iterator[Event]:
        """The untouched base, before the first round."""
        yield from self._evaluated("evaluating the base model", 0, {"base": {}})

    def after(self, number: int, adapter: Adapter, state: State) -> Iterator[Event]:
        """The global adapter when a round evaluates it; at the end also cut to each rank type.

        Of a method with personal models each client's own model answers the client's questions.
        """
        prepared, settings = self.prepared, self.prepared.experiment.evaluation
        last = number == prepared.experiment.federation.rounds
        is_due = last or (settings.every > 0 and number % settings.every == 0)
        stage = "evaluating the trained adapter" if last else f"evaluating after round {number}"
        if Feature.PERSONAL in prepared.method.features:
            if is_due and prepared.questions:
                yield self._of_personal_models(stage, number, state)
            return
        adapters = {}
        if is_due:
            adapters["global"] = adapter
        if last:
            for name, ranks in prepared.truncated.items():
                adapters[name] = adapter.only(ranks).first(ranks)
        yield from self._evaluated(stage, number, adapters)

    def _evaluated(
        self, stage: str, number: int, adapters: Mapping[str, Mapping[str, Factors]]
    ) -> Iterator[Event]:
        """These adapters side by side; each event has an equal part of the seconds."""
        prepared = self.prepared
        if not prepared.questions or not adapters:
            return
        started, settings = time.perf_counter(), prepared.experiment.evaluation
        self.meter.begin(stage, len(adapters) * len(prepared.questions))
        results = evaluate_with_answers(
            prepared.base,
            list(adapters.values()),
            prepared.questions,
            prepared.prompt,
            settings,
            self.meter,
        )
        self.meter.end()
        seconds = (time.perf_counter() - started) / len(adapters)
        for name, result in zip(adapters, results, strict=True):
            yield self._recorded(number, name, seconds, result.rows, result.answers)

    def _of_personal_models(self, stage: str, number: int, state: State) -> Event:
        """Every client's questions answered by its own model; one event, as of a global one."""
        prepared, started = self.prepared, time.perf_counter()
        store, settings = ClientStore(self.record.folder / PRIVATE), prepared.experiment.evaluation
        rows: list[dict[str, Any]] = []
        answers: list[Answer] = []
        self.meter.begin(stage, len(prepared.questions))
        for id, questions in itertools.groupby(prepared.questions, lambda q: q.client):
            model = personal_model(prepared, store, id, number + 1, state)
            (result,) = evaluate_with_answers(
                prepared.base, [model], list(questions), prepared.prompt, settings, self.meter
            )
            rows += result.rows
            answers += result.answers
        self.meter.end()
        return self._recorded(number, "global", time.perf_counter() - started, rows, answers)

    def _recorded(
        self,
        number: int,
        adapter: str,
        seconds: float,
        rows: list[dict[str, Any]],
        answers: Sequence[Answer],
    ) -> Event:
        """The event of one adapter's evaluation, after its sample answers are written."""
        kept = sample(self.prepared.questions, self.prepared.experiment.evaluation.answers)
        place = {"round": number, "adapter": adapter}
        SampleAnswers(self.record.folder).append([place | line(answers[index]) for index in kept])
        return self.record.append("evaluation", **place, seconds=seconds, clients=rows)


def line(answer: Answer) -> dict[str, Any]:
    """An answer as the file of sample answers has it; long texts are cut."""
    question, prompt, reference = answer.question, answer.prompt, answer.question.example.output
    return {
        "population": "seen" if question.seen else "unseen",
        "client": question.client,
        "category": question.category,
        "prompt": prompt[-_LONGEST_TEXT:],
        "reference": reference[:_LONGEST_TEXT],
        "answer": answer.text,
        "rouge_l": answer.score.rouge_l,
        "exact_match": bool(answer.score.exact_match),
    }


def personal_model(
    prepared: PreparedRun, store: ClientStore, id: str, round: int, state: State
) -> Adapter:
    """What a client would start the next round from; a held-out client at the largest ranks."""
    ranks = prepared.clients[id].ranks if id in prepared.clients else prepared.ranks
    client, method = Client(id, ranks, "", 1), prepared.method
    download = method.handout(state, client, prepared.context(round))
    fresh = FreshAdapters(prepared.base.shapes, prepared.experiment.seed, id, round)
    return method.prepare(download, store.private(id, round), fresh).adapter
