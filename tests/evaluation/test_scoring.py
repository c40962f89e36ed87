import math
from collections import Counter
from dataclasses import astuple, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexlora.data.corpus import Corpus, Example
from flexlora.data.encoding import encode
from flexlora.data.prompts import plain
from flexlora.evaluation import generation, held_out_loss, vllm_engine
from flexlora.evaluation.rouge import rouge_l
from flexlora.evaluation.scoring import (
    Evaluation,
    Question,
    Score,
    evaluate_each,
    evaluate_with_answers,
    pick,
    sample,
)
from flexlora.journal.meter import Meter
from flexlora.journal.record import Record, mean_scores
from support import models
from support.factors import random_factors

SETTINGS = Evaluation(max_new_tokens=7, max_prompt_tokens=23, batch_tokens=100)


@pytest.fixture(scope="module")
def questions(base):
    """Rows of three clients, one of them with two categories; some answers are right."""
    draw = np.random.default_rng(3)
    owners = ["anna", "bo", "anna", "carl", "bo", "anna", "anna"]
    kinds = ["sum", "sort", "sum", "sum", "sort", "ask", "sum"]
    texts = [" ".join(draw.choice(models.WORDS, size)) for size in range(2, 9)]
    read = generation.prompts([Example(t, "", "") for t in texts], plain, base.tokenizer, 23)
    (right,) = generation.answers_of_each(base, 1, read, 7, 1)
    outputs = [
        right[0].upper(),
        "a dog",
        right[2],
        "the cat",
        right[4] + " red",
        "one",
        "two a",
    ]
    rows = zip(owners, kinds, texts, outputs, strict=True)
    return [Question(o, k, o != "bo", Example(t, "", out)) for o, k, t, out in rows]


def table(clients: dict[str, int], splits: tuple[str, ...] = ("test", "train")) -> Corpus:
    """So many rows of each client in each split; every row is named in its output."""
    rows = [
        (c, s, f"{c}{s}{i}") for i in range(9) for c, n in clients.items() for s in splits if i < n
    ]
    columns = zip(*rows, strict=True)
    client, split, output = (list(column) for column in columns)
    same = ["Do it."] * len(client)
    return Corpus.build(
        {
            "client": client,
            "split": split,
            "category": [f"of {c}" for c in client],
            "instruction": same,
            "input": same,
            "output": output,
        }
    )


def test_rows_add_up_what_each_question_scores(base, questions):
    (rows,) = evaluate_each(base, [{}], questions, plain, SETTINGS)
    assert [(r["client"], r["category"], r["seen"], r["examples"]) for r in rows] == [
        ("anna", "sum", True, 3),
        ("bo", "sort", False, 2),
        ("carl", "sum", True, 1),
        ("anna", "ask", True, 1),
    ]
    for row in rows:
        own = [q for q in questions if (q.client, q.category) == (row["client"], row["category"])]
        examples = [q.example for q in own]
        read = generation.prompts(examples, plain, base.tokenizer, 23)
        (written,) = generation.answers_of_each(base, 1, read, 7, 1)
        pairs = [(e.output, w) for e, w in zip(examples, written, strict=True)]
        assert row["rouge_l"] == pytest.approx(sum(rouge_l(*pair) for pair in pairs))
        assert row["exact_match"] == sum(generation.exact_match(*pair) for pair in pairs)
        tokens = [encode(e, plain, base.tokenizer, 30) for e in examples]
        losses = held_out_loss.losses(base, tokens, 1)
        assert row["loss_total"] == pytest.approx(sum(loss.total for loss in losses), rel=1e-5)
        assert row["loss_tokens"] == sum(len(e.output.split()) + 1 for e in examples)
    assert sum(row["exact_match"] for row in rows) == 2


def test_the_journal_takes_the_rows_and_means_can_be_had(base, questions, tmp_path):
    (rows,) = evaluate_each(base, [{}], questions, plain, SETTINGS)
    record = Record(tmp_path)
    record.append("evaluation", round=0, adapter="base", seconds=0.0, clients=rows)
    (event,) = record.events("evaluation")
    assert event["clients"] == rows
    assert mean_scores(rows)["exact_match"] == pytest.approx(100 * 2 / 7)


def test_no_questions_no_rows(base):
    assert evaluate_each(base, [{}, {}], [], plain, SETTINGS) == [[], []]


def updates(base, rank: int) -> dict:
    return {
        module: random_factors(out, rank, in_, seed, torch.float32)
        for seed, (module, (out, in_)) in enumerate(base.shapes.items())
    }


def test_adapters_evaluated_at_once_score_as_one_at_a_time(base, questions):
    whole = updates(base, 5)
    adapters = [whole, *({m: f.first(rank) for m, f in whole.items()} for rank in (1, 3))]
    expected = []
    for adapter in adapters:
        expected += evaluate_each(base, [adapter], questions, plain, SETTINGS)
    results = evaluate_each(base, adapters, questions, plain, SETTINGS)
    assert results == expected
    assert len({row[0]["loss_total"] for row in results}) == 3


def test_the_model_has_no_adapter_afterwards(base, questions):
    before = evaluate_each(base, [{}], questions, plain, SETTINGS)
    evaluate_each(base, [updates(base, 2), updates(base, 3)], questions, plain, SETTINGS)
    assert all(layer.adapters == () for layer in base._layers.values())
    assert evaluate_each(base, [{}], questions, plain, SETTINGS) == before


def test_another_engine_is_given_adapters_and_prompts(base, questions, monkeypatch):
    adapters = [updates(base, 2), updates(base, 3)]
    calls = []

    def stand_in(*given):
        calls.append(given)
        return [[q.example.output for q in questions], ["nothing"] * len(questions)]

    monkeypatch.setattr(vllm_engine, "answers_of_each", stand_in)
    other = replace(SETTINGS, engine="vllm")
    results = evaluate_each(base, adapters, questions, plain, other)
    ((_, given, read, new, end),) = calls
    assert (given, len(read), new) == (adapters, len(questions), 7)
    assert end is None
    assert [sum(row["exact_match"] for row in rows) for rows in results] == [len(questions), 0]
    own = evaluate_each(base, adapters, questions, plain, SETTINGS)
    for ours, other_rows in zip(own, results, strict=True):
        assert [r["loss_total"] for r in ours] == [r["loss_total"] for r in other_rows]


def test_a_loss_that_is_not_finite_is_an_error(base, questions, monkeypatch):
    broken = [held_out_loss.Loss(1.0 if n != 3 else math.nan, 2) for n in range(len(questions))]
    monkeypatch.setattr(held_out_loss, "losses", lambda *_: broken)
    with pytest.raises(ValueError, match="loss of a row of client 'carl' is nan"):
        evaluate_each(base, [{}], questions, plain, SETTINGS)


scores = st.builds(
    Score,
    st.integers(0, 9),
    st.integers(0, 9).map(float),
    st.integers(0, 9),
    st.integers(0, 9).map(float),
    st.integers(0, 9),
)


@given(scores, scores)
def test_scores_add_field_by_field(a, b):
    assert astuple(a + b) == tuple(x + y for x, y in zip(astuple(a), astuple(b), strict=True))
    assert a + Score() == a


clients = st.dictionaries(st.sampled_from("abcdefgh"), st.integers(1, 9), min_size=1)


@settings(deadline=None)
@given(clients, st.integers(1, 11), st.integers(0, 3), st.randoms())
def test_a_clients_questions_depend_on_no_other_client(sizes, most, seed, random):
    corpus = table(sizes)
    names = list(sizes)
    random.shuffle(names)
    picked = pick(corpus, names, True, most, seed)
    assert picked == pick(corpus, sorted(names), True, most, seed)
    assert Counter(q.client for q in picked) == {c: min(most, n) for c, n in sizes.items()}
    assert len({q.example.output for q in picked}) == len(picked)
    alone = table({names[0]: sizes[names[0]]})
    assert pick(alone, names[:1], True, most, seed) == [q for q in picked if q.client == names[0]]
    fewer = pick(corpus, names, True, max(1, most - 1), seed)
    assert {q.example.output for q in fewer} <= {q.example.output for q in picked}


def test_questions_are_the_clients_own_rows_of_the_split():
    corpus = table({"a": 5, "b": 3}, ("train", "validation", "test"))
    for question in pick(corpus, ["b", "a"], False, 2, 0, split="validation"):
        assert question.example.output.startswith(f"{question.client}validation")
        assert (question.category, question.seen) == (f"of {question.client}", False)
    everything = pick(corpus, ["a"], True, None, 0)
    assert [q.example.output for q in everything] == [f"atest{i}" for i in range(5)]


def test_the_draw_is_by_seed_and_client():
    corpus = table({"a": 9, "b": 9})

    def drawn(client: str, seed: int) -> str:
        return "".join(q.example.output[-1] for q in pick(corpus, [client], True, 4, seed))

    assert len({drawn(client, seed) for client in "ab" for seed in range(5)}) > 5


def test_without_categories_or_rows_in_the_split():
    corpus = Corpus.build(
        {
            "client": ["a", "b"],
            "split": ["test", "train"],
            "instruction": ["x", "y"],
            "input": ["", ""],
            "output": ["1", "2"],
        }
    )
    assert pick(corpus, ["a", "b"], True, 3, 0) == [
        Question("a", None, True, Example("x", "", "1"))
    ]


def test_clients_and_numbers_that_cannot_be_are_refused():
    corpus = table({"a": 2, "b": 3})
    with pytest.raises(ValueError, match="'c' has no rows in the corpus of 2 clients"):
        pick(corpus, ["a", "c"], True, 1, 0)
    with pytest.raises(ValueError, match="rows_per_client is 0"):
        pick(corpus, ["a"], True, 0, 0)
    with pytest.raises(ValueError, match="no key column 'split'"):
        pick(Corpus(corpus.table.drop_columns(["split"])), ["a"], True, 1, 0)
    with pytest.raises(ValueError, match="max_prompt_tokens is 1; give at least 2"):
        Evaluation(max_prompt_tokens=1)
    with pytest.raises(ValueError, match=r"engine is 'vlm'; give one of own, vllm\."):
        Evaluation(engine="vlm")


def test_answers_belong_to_their_questions_and_add_up_to_the_rows(base, questions):
    adapters = [{}, updates(base, 2)]
    results = evaluate_with_answers(base, adapters, questions, plain, SETTINGS)
    assert [r.rows for r in results] == evaluate_each(base, adapters, questions, plain, SETTINGS)
    for result in results:
        assert [answer.question for answer in result.answers] == questions
        for answer in result.answers:
            example = answer.question.example
            assert answer.prompt == plain(example)[0]
            assert answer.score.rouge_l == rouge_l(example.output, answer.text)
        total = sum(answer.score.rouge_l for answer in result.answers)
        assert total == pytest.approx(sum(row["rouge_l"] for row in result.rows))
    assert results[0].answers[0].score.exact_match == 1  # its output is the base's answer
    texts = [[answer.text for answer in result.answers] for result in results]
    assert texts[0] != texts[1]


@pytest.mark.parametrize("batch_tokens", [40, 1000])
def test_answers_are_counted_as_they_grow(base, questions, batch_tokens):
    counts = []

    class Noting(Meter):
        def advance(self, count=1):
            super().advance(count)
            counts.append(self.done)

    settings, adapters = replace(SETTINGS, batch_tokens=batch_tokens), [{}, updates(base, 2)]
    evaluate_with_answers(base, adapters, questions, plain, settings, Noting())
    assert counts[-1] == pytest.approx(2 * len(questions))
    assert counts == sorted(counts)
    assert len({round(count) for count in counts}) > 5


def test_a_sample_has_as_many_clients_as_possible(questions):
    def clients(count):
        return [(questions[i].client, i) for i in sample(questions, count)]

    # anna has the rows 0, 2, 5 and 6, carl 3, both seen; bo has 1 and 4 and is not.
    assert clients(2) == [("anna", 0), ("bo", 1)]
    assert clients(3) == [("anna", 0), ("bo", 1), ("carl", 3)]
    assert clients(5) == [("anna", 0), ("bo", 1), ("anna", 2), ("carl", 3), ("bo", 4)]
    assert len(clients(99)) == len(questions)
    assert clients(0) == []
