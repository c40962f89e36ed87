"""Evaluation of adapters: questions from clients' test rows, and scores summed by client."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal

import numpy as np

from flexlora.data import Corpus, Example, Int32s, Prompt, by_key, encode
from flexlora.errors import ConfigError
from flexlora.evaluation import generation, held_out_loss, vllm_engine
from flexlora.evaluation.rouge import rouge_l
from flexlora.journal import Meter
from flexlora.lowrank import Factors
from flexlora.model import Base
from flexlora.seeds import rng

ENGINES: Final = ("own", "vllm")
"""The engines that can generate answers."""


@dataclass(frozen=True)
class Evaluation:
    """The settings of evaluation.

    The global adapter is evaluated after every ``every`` rounds (0: only after the last), and
    then also truncated to the ranks of each rank type (``truncated``); the base model is
    evaluated before the first round (``base``). Each evaluation uses ``rows_per_client`` test
    rows of ``seen_clients`` training clients and of ``unseen_clients`` held-out clients.

    ``batch_tokens`` bounds the tokens in memory at once, over all adapters and with room for
    the answers; it affects speed, and results only by rounding (see
    ``generation.answers_of_each``: in bfloat16 this can be visible). A prompt of more than
    ``max_prompt_tokens`` loses tokens from its middle. The loss is computed on rows of at most
    ``max_prompt_tokens + max_new_tokens``. Answers come from the library's ``own`` engine or
    from ``vllm``, which loads the base model a second time; the loss always from our own.
    Of every evaluation the answers to ``answers`` questions are kept, for people to read.

    Every client that trains holds out a ``client_share`` of its own rows, or those that its data
    marks as "validation", and evaluates the loss of the global adapter on at most ``client_rows``
    of them, after every ``client_every`` rounds (0: only after the last) and, with ``base``,
    before the first. With a share of 0 no client holds out rows.

    Raises:
        ConfigError: a number is too small, or there is no such engine.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    every: int = 0
    base: bool = True
    truncated: bool = True
    seen_clients: int = 16
    unseen_clients: int = 16
    rows_per_client: int = 4
    max_new_tokens: int = 128
    max_prompt_tokens: int = 896
    batch_tokens: int = 8192
    engine: Literal["own", "vllm"] = "own"
    answers: int = 20
    client_share: float = 0.0
    client_every: int = 1
    client_rows: int = 64

    def __post_init__(self) -> None:
        least = {"every": 0, "seen_clients": 0, "unseen_clients": 0, "rows_per_client": 1}
        least |= {"answers": 0, "max_new_tokens": 1, "max_prompt_tokens": 2, "batch_tokens": 1}
        least |= {"client_every": 0, "client_rows": 1}
        for name, bound in least.items():
            value = getattr(self, name)
            if value < bound:
                raise ConfigError(f"evaluation.{name} is {value}; give at least {bound}.")
        if not 0 <= self.client_share < 1:
            raise ConfigError(
                f"evaluation.client_share is {self.client_share}; give a share from 0 to below 1, "
                "such as 0.2."
            )
        if self.engine not in ENGINES:
            raise ConfigError(
                f"evaluation.engine is {self.engine!r}; give one of {', '.join(ENGINES)}."
            )

    def require_engine(self) -> None:
        """Check that what generates the answers is installed, before anything is loaded.

        Raises:
            ConfigError: it is not.
        """
        if self.engine == vllm_engine.NAME:
            vllm_engine.require()


@dataclass(frozen=True)
class Question:
    """One test row of a client; ``seen`` if the client takes part in the training."""

    client: str
    category: str | None
    seen: bool
    example: Example


@dataclass(frozen=True)
class Score:
    """Scores of some questions as totals, so that they can be added.

    ``rouge_l`` is a sum of F-measures in 0..1, ``exact_match`` the number of exact matches;
    ``loss_total`` is in nats over ``loss_tokens`` response tokens.
    """

    examples: int = 0
    rouge_l: float = 0.0
    exact_match: int = 0
    loss_total: float = 0.0
    loss_tokens: int = 0

    def __add__(self, other: Score) -> Score:
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Score(*(a + b for a, b in pairs))


@dataclass(frozen=True)
class Answer:
    """The answer of one adapter to a question, with its scores, and the ``prompt`` as a text."""

    question: Question
    prompt: str
    text: str
    score: Score


@dataclass(frozen=True)
class Evaluated:
    """The evaluation of one adapter: ``rows`` for the journal, and the answer to each question."""

    rows: list[dict[str, Any]]
    answers: list[Answer]


def pick(
    corpus: Corpus,
    clients: Iterable[str],
    seen: bool,
    rows_per_client: int | None,
    seed: int,
    split: str = "test",
) -> list[Question]:
    """Up to ``rows_per_client`` random rows of each client's split (None: all of them).

    Questions are sorted by client, then by row. A client's draw depends only on the seed, its
    name and its own rows; fewer rows are a subset of more rows. A client without a row in the
    split has no question. Cost: one pass over the corpus.

    Raises:
        ConfigError: a client is not in the corpus, or ``rows_per_client`` is below 1.
        DataError: the corpus has no clients or no splits.
    """
    if rows_per_client is not None and rows_per_client < 1:
        raise ConfigError(
            f"evaluation.rows_per_client is {rows_per_client}; give at least 1 (None in a call of "
            "pick for all rows)."
        )
    rows_by_client = by_key(corpus.keys("client"))
    in_split = corpus.keys("split") == split
    categories = corpus.keys("category") if "category" in corpus.columns else None
    questions = []
    for client in sorted(set(clients)):
        if client not in rows_by_client:
            raise ConfigError(
                f"Client {client!r} has no rows in the corpus of {len(rows_by_client)} clients; "
                "check its spelling."
            )
        rows = rows_by_client[client][in_split[rows_by_client[client]]]
        drawn = rng(seed, "evaluation", client).permutation(rows)[:rows_per_client]
        chosen = np.sort(drawn).tolist()
        for row, example in zip(chosen, corpus.examples(chosen), strict=True):
            category = None if categories is None else str(categories[row])
            questions.append(Question(client, category, seen, example))
    return questions


def sample(questions: Sequence[Question], count: int) -> list[int]:
    """The indices, ascending, of at most ``count`` questions whose answers are kept.

    The first row of as many clients as possible, then the second; the seen and the unseen clients
    in turn.
    """
    rows: Counter[str] = Counter()
    clients: dict[bool, dict[str, int]] = {True: {}, False: {}}
    places = []
    for index, question in enumerate(questions):
        of_group = clients[question.seen]
        client = of_group.setdefault(question.client, len(of_group))
        places.append((rows[question.client], client, not question.seen, index))
        rows[question.client] += 1
    return sorted(index for *_, index in sorted(places)[:count])


def evaluate_each(
    base: Base,
    adapters: Sequence[Mapping[str, Factors]],
    questions: Sequence[Question],
    prompt: Prompt,
    settings: Evaluation,
) -> list[list[dict[str, Any]]]:
    """The scores alone of ``evaluate_with_answers``: its rows, by adapter."""
    results = evaluate_with_answers(base, adapters, questions, prompt, settings)
    return [result.rows for result in results]


def evaluate_with_answers(
    base: Base,
    adapters: Sequence[Mapping[str, Factors]],
    questions: Sequence[Question],
    prompt: Prompt,
    settings: Evaluation,
    meter: Meter | None = None,
) -> list[Evaluated]:
    """The scores of the model with each adapter as rows of the journal, and its answers.

    There is a row for each client (for each of its categories, if it has several), in order of
    first appearance: ``client``, ``category``, ``seen`` and the fields of ``Score``. Answers are
    generated from the prompts; the loss is that of the reference outputs. An adapter without
    modules stands for the base model. All adapters generate answers together, in every batch;
    the loss is computed adapter by adapter. ``meter`` counts answers, of all adapters.

    Raises:
        ConfigError: a loss is not finite, prompts and answers exceed the model's context, or
            the engine is not installed or does not support the adapters.
        AdapterError: an adapter does not fit the model.
    """
    prompts = _prompt_ids(base, questions, prompt, settings)
    texts = _answers(base, adapters, prompts, settings, prompt.end, meter)
    results = []
    for adapter, adapter_texts in zip(adapters, texts, strict=True):
        with base.attached(adapter):
            scores = _scores(base, questions, adapter_texts, prompt, settings)
        answers = [
            Answer(question, prompt(question.example)[0], text, score)
            for question, text, score in zip(questions, adapter_texts, scores, strict=True)
        ]
        results.append(Evaluated(_rows(questions, scores), answers))
    return results


def _prompt_ids(
    base: Base, questions: Sequence[Question], prompt: Prompt, settings: Evaluation
) -> list[Int32s]:
    """The ids of each question's prompt."""
    examples = [question.example for question in questions]
    return generation.prompts(examples, prompt, base.tokenizer, settings.max_prompt_tokens)


def _answers(
    base: Base,
    adapters: Sequence[Mapping[str, Factors]],
    prompts: Sequence[Int32s],
    settings: Evaluation,
    end: int | None,
    meter: Meter | None,
) -> list[list[str]]:
    """The answers of each adapter to each prompt."""
    new, room = settings.max_new_tokens, settings.batch_tokens
    if settings.engine == "vllm":
        return vllm_engine.answers_of_each(base, adapters, prompts, new, end)
    with base.attached(*adapters):
        count = len(adapters)
        return generation.answers_of_each(base, count, prompts, new, room, meter, end)


def _scores(
    base: Base,
    questions: Sequence[Question],
    answers: Sequence[str],
    prompt: Prompt,
    settings: Evaluation,
) -> list[Score]:
    """The score of each question; the loss is that of the currently attached adapter."""
    examples = [question.example for question in questions]
    room = settings.max_prompt_tokens + settings.max_new_tokens
    tokens = [encode(example, prompt, base.tokenizer, room) for example in examples]
    losses = held_out_loss.losses(base, tokens, settings.batch_tokens)
    return [
        Score(
            examples=1,
            rouge_l=rouge_l(example.output, answer),
            exact_match=int(generation.exact_match(example.output, answer)),
            loss_total=loss.total,
            loss_tokens=loss.tokens,
        )
        for example, answer, loss in zip(examples, answers, losses, strict=True)
    ]


def _rows(questions: Sequence[Question], scores: Sequence[Score]) -> list[dict[str, Any]]:
    """Scores summed by client and category."""
    totals: dict[tuple[str, str | None, bool], Score] = {}
    for question, score in zip(questions, scores, strict=True):
        if not math.isfinite(score.loss_total):
            raise ConfigError(
                f"The held-out loss of a row of client {question.client!r} is {score.loss_total}, "
                "so training has diverged or overflowed; lower training.learning_rate, or set "
                "model.dtype to 'float32'."
            )
        key = (question.client, question.category, question.seen)
        totals[key] = totals.get(key, Score()) + score
    return [
        {"client": client, "category": category, "seen": seen, **dataclasses.asdict(score)}
        for (client, category, seen), score in totals.items()
    ]
