"""What an evaluation is: questions of clients' test rows, and scores added up by client."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal

import numpy as np

from flexlora.data import Corpus, Example, Int32s, Prompt, by_key, encode
from flexlora.errors import ConfigError
from flexlora.evaluation import generation, held_out_loss, vllm_engine
from flexlora.evaluation.rouge import rouge_l
from flexlora.lowrank import Factors
from flexlora.model import Base
from flexlora.seeds import rng

ENGINES: Final = ("own", "vllm")
"""What can write the answers."""


@dataclass(frozen=True)
class Evaluation:
    """What is evaluated and how.

    The global adapter is evaluated after every ``every`` rounds (0: only after the last),
    then also cut to each rank type (``truncated``), and the base model before the first
    (``base``), on ``rows_per_client`` test rows of so many clients that train and of so many
    that never do.

    ``batch_tokens`` bounds the tokens that are in memory at once, of all adapters together
    and with room for the answers; it changes speed, and results by rounding only (see
    ``generation.answers_of_each``: in bfloat16 that can be seen). A longer prompt loses
    tokens from its middle. The loss is of rows of at most ``max_prompt_tokens +
    max_new_tokens``. Answers are written by our own ``engine`` or by ``vllm``, which loads
    the base model a second time; the loss is our own either way.

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

    def __post_init__(self) -> None:
        least = {"every": 0, "seen_clients": 0, "unseen_clients": 0, "rows_per_client": 1}
        least |= {"max_new_tokens": 1, "max_prompt_tokens": 2, "batch_tokens": 1}
        for name, bound in least.items():
            value = getattr(self, name)
            if value < bound:
                raise ConfigError(f"evaluation.{name} is {value}; give at least {bound}.")
        if self.engine not in ENGINES:
            raise ConfigError(
                f"evaluation.engine is {self.engine!r}; give one of {', '.join(ENGINES)}."
            )


@dataclass(frozen=True)
class Question:
    """One test row of a client; ``seen`` if the client has a part in the training."""

    client: str
    category: str | None
    seen: bool
    example: Example


@dataclass(frozen=True)
class Score:
    """Scores of some questions as totals, so that they may be added.

    ``rouge_l`` adds F-measures in 0..1, ``exact_match`` ones and zeros; the loss is in nats
    over ``loss_tokens`` response tokens.
    """

    examples: int = 0
    rouge_l: float = 0.0
    exact_match: int = 0
    loss_total: float = 0.0
    loss_tokens: int = 0

    def __add__(self, other: Score) -> Score:
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Score(*(a + b for a, b in pairs))


def pick(
    corpus: Corpus,
    clients: Iterable[str],
    seen: bool,
    rows_per_client: int | None,
    seed: int,
    split: str = "test",
) -> list[Question]:
    """At most ``rows_per_client`` rows of each client's split (all of them for None).

    Questions are sorted by client, then by row. A client's draw depends on the seed, its
    name and its own rows, on no other client; fewer rows are a part of more. A client
    without a row in the split has no question. One pass over the corpus.

    Raises:
        ConfigError: a client is none of the corpus's, or the corpus has no clients or splits.
    """
    if rows_per_client is not None and rows_per_client < 1:
        raise ConfigError(
            f"Give at least one row per client (or none for all), not {rows_per_client}."
        )
    held = by_key(corpus.keys("client"))
    inside = corpus.keys("split") == split
    categories = corpus.keys("category") if "category" in corpus.columns else None
    found = []
    for client in sorted(set(clients)):
        if client not in held:
            raise ConfigError(
                f"Client {client!r} has no rows in the corpus of {len(held)} clients."
            )
        rows = held[client][inside[held[client]]]
        drawn = rng(seed, "evaluation", client).permutation(rows)[:rows_per_client]
        chosen = np.sort(drawn).tolist()
        for row, example in zip(chosen, corpus.examples(chosen), strict=True):
            category = None if categories is None else str(categories[row])
            found.append(Question(client, category, seen, example))
    return found


def evaluate(
    base: Base, questions: Sequence[Question], prompt: Prompt, settings: Evaluation
) -> list[dict[str, Any]]:
    """The scores of the model with the adapter it has now, as the journal's rows.

    There is a row for each client (for each of its categories, where it has several), in
    order of first appearance: ``client``, ``category``, ``seen`` and the fields of
    ``Score``. Answers are generated from the prompt alone; the loss is of the outputs.

    Raises:
        ConfigError: a loss is not finite, prompts and answers exceed the model's context, or
            the engine is not our own: another one has to be given the adapter itself.
    """
    if settings.engine != "own":
        raise ConfigError(
            f"evaluation.engine {settings.engine!r} does not see the adapter in the model; give "
            "the adapter to evaluate_each, or set evaluation.engine to 'own'."
        )
    read = _read(base, questions, prompt, settings)
    answers = generation.answers(base, read, settings.max_new_tokens, settings.batch_tokens)
    return _rows(questions, _scores(base, questions, answers, prompt, settings))


def evaluate_each(
    base: Base,
    adapters: Sequence[Mapping[str, Factors]],
    questions: Sequence[Question],
    prompt: Prompt,
    settings: Evaluation,
) -> list[list[dict[str, Any]]]:
    """The scores of the model with each adapter, as ``evaluate`` has them.

    An adapter without modules is the base model's. All adapters answer at once, side by side
    in every batch; the loss is adapter by adapter.

    Raises:
        ConfigError: as ``evaluate``; or the engine is not there or cannot take the adapters.
    """
    answers = _answers(base, adapters, _read(base, questions, prompt, settings), settings)
    found = []
    for adapter, written in zip(adapters, answers, strict=True):
        with base.attached(adapter):
            scores = _scores(base, questions, written, prompt, settings)
        found.append(_rows(questions, scores))
    return found


def _read(
    base: Base, questions: Sequence[Question], prompt: Prompt, settings: Evaluation
) -> list[Int32s]:
    """The ids that the model reads of each question."""
    examples = [question.example for question in questions]
    return generation.prompts(examples, prompt, base.tokenizer, settings.max_prompt_tokens)


def _answers(
    base: Base,
    adapters: Sequence[Mapping[str, Factors]],
    read: Sequence[Int32s],
    settings: Evaluation,
) -> list[list[str]]:
    """The answers of each adapter to each question."""
    new = settings.max_new_tokens
    if settings.engine == "vllm":
        return vllm_engine.answers_of_each(base, adapters, read, new)
    with base.attached(*adapters):
        return generation.answers_of_each(base, len(adapters), read, new, settings.batch_tokens)


def _scores(
    base: Base,
    questions: Sequence[Question],
    answers: Sequence[str],
    prompt: Prompt,
    settings: Evaluation,
) -> list[Score]:
    """The score of each question; the loss is of the model with the adapter it has now."""
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
    """Scores added up by client and category."""
    totals: dict[tuple[str, str | None, bool], Score] = {}
    for question, score in zip(questions, scores, strict=True):
        if not math.isfinite(score.loss_total):
            raise ConfigError(
                f"The held-out loss of a row of client {question.client!r} is "
                f"{score.loss_total}: the model or its adapter is out of bounds; lower "
                "training.learning_rate, or give model.dtype 'float32'."
            )
        key = (question.client, question.category, question.seen)
        totals[key] = totals.get(key, Score()) + score
    return [
        {"client": client, "category": category, "seen": seen, **dataclasses.asdict(score)}
        for (client, category, seen), score in totals.items()
    ]
