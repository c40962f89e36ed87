import logging

import numpy as np
import pytest
import torch

from flexlora.data.corpus import Example
from flexlora.data.prompts import plain
from flexlora.evaluation.generation import answers_of_each, exact_match, prompts
from flexlora.model.source import Source
from support import models

NEW = 17
STOPS = (2, 3)
LENGTHS = (3, 11, 1, 7, 29, 2, 5, 13, 19, 23, 37, 17)


@pytest.fixture(scope="module")
def questions():
    draw = np.random.default_rng(1)
    return [draw.integers(3, 15, size=length).astype(np.int32) for length in LENGTHS]


def answers(base, questions: list, new: int, batch_tokens: int) -> list[str]:
    """The answers with the one adapter, or none, that the model has."""
    return answers_of_each(base, 1, questions, new, batch_tokens)[0]


def ids_written(base, prompt: np.ndarray, new: int = NEW) -> list[int]:
    """One prompt without padding, cache or ``generate``: all of it again for each token."""
    ids, written = torch.from_numpy(prompt.astype(np.int64))[None], []
    with torch.no_grad():
        while len(written) < new:
            token = int(base.model(input_ids=ids, use_cache=False).logits[0, -1].argmax())
            if token in STOPS:
                break
            written.append(token)
            ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
    return written


def written_alone(base, prompt: np.ndarray) -> str:
    ids = ids_written(base, prompt)
    return base.tokenizer.decode(ids, skip_special_tokens=True).strip()


def test_prompts_together_get_what_each_gets_alone(base, questions):
    assert base.decodes(96)
    alone = [written_alone(base, prompt) for prompt in questions]
    assert len(set(alone)) > len(alone) // 2
    for batch_tokens in (1, 200, 10_000):
        assert answers(base, questions, NEW, batch_tokens) == alone


def test_some_answers_end_by_themselves_and_some_at_the_limit(base, questions):
    lengths = [len(ids_written(base, prompt)) for prompt in questions]
    assert min(lengths) < NEW == max(lengths)


def test_answers_are_those_of_the_attached_adapter(base, adapter, questions):
    without = answers(base, questions, NEW, 500)
    with base.attached(adapter):
        assert answers(base, questions, NEW, 500) == [
            written_alone(base, prompt) for prompt in questions
        ]
        assert answers(base, questions, NEW, 500) != without
    assert answers(base, questions, NEW, 500) == without


def test_answers_stay_in_the_order_of_the_questions(base, questions):
    forward = answers(base, questions, NEW, 300)
    assert answers(base, questions[::-1], NEW, 300) == forward[::-1]
    assert answers(base, [], NEW, 300) == []


def test_another_attention_writes_the_same(tmp_path, questions, base, adapter):
    other = Source(str(models.save(tmp_path)), attention="eager").load()
    assert answers(other, questions, NEW, 200) == answers(base, questions, NEW, 200)
    half = {module: f.first(2) for module, f in adapter.items()}
    with base.attached(adapter, half), other.attached(adapter, half):
        expected = answers_of_each(base, 2, questions, NEW, 400)
        assert answers_of_each(other, 2, questions, NEW, 400) == expected
    assert other.model.config._attn_implementation == "eager"


def test_published_settings_are_set_aside_and_put_back(base, questions):
    published = base.model.generation_config
    answers(base, questions[:2], NEW, 100)
    assert base.model.generation_config is published
    assert published.repetition_penalty == 3.0


def test_nothing_is_logged(base, questions):
    heard = []
    handler = logging.Handler()
    handler.emit = heard.append
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        answers(base, questions, NEW, 100)
    finally:
        logger.removeHandler(handler)
    assert [record.getMessage() for record in heard] == []


def test_beyond_the_models_context_is_refused(base, questions):
    longest = max(LENGTHS)
    assert len(answers(base, questions, 96 - longest, 4000)) == len(LENGTHS)
    with pytest.raises(ValueError, match="37 tokens and 60 new tokens exceed the 96 positions"):
        answers(base, questions, 97 - longest, 4000)


def test_the_prompt_has_no_trace_of_the_output(base):
    long = Example("the cat sees", " ".join(["red"] * 40), "two")
    read = prompts([long, Example("a dog", "", "one")], plain, base.tokenizer, 10)
    other = prompts(
        [Example(long.instruction, long.input, "blue " * 30), Example("a dog", "", "")],
        plain,
        base.tokenizer,
        10,
    )
    assert [ids.tolist() for ids in read] == [ids.tolist() for ids in other]
    assert base.tokenizer.decode(read[0]) == "the cat sees red red red red red red red"
    assert base.tokenizer.decode(read[1]) == "a dog"


@pytest.mark.parametrize(
    ("reference", "answer", "equal"),
    [
        ("Yes", "yes\n", True),
        ("STRASSE", "straße", True),
        (" no ", "no", True),
        ("yes", "yes.", False),
        ("a  b", "a b", False),
        ("", " ", True),
    ],
)
def test_exact_match(reference, answer, equal):
    assert exact_match(reference, answer) is equal
