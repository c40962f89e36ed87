import os
import subprocess
import sys
from collections import Counter

import pytest

pytest.importorskip("reasoning_gym", reason="needs the extra 'demo'")

from flexlora.data.corpora.procedural import FAMILIES, generate
from flexlora.errors import ConfigError


@pytest.fixture(scope="module")
def corpus():
    return generate(examples=30, seed=1)


def test_every_family_is_a_client(corpus):
    assert len(FAMILIES) >= 32
    assert Counter(corpus.keys("client").tolist()) == dict.fromkeys(FAMILIES, 30)
    for client in FAMILIES:
        own = corpus.keys("client") == client
        assert len(set(corpus.keys("category")[own])) == 1
        assert len(set(corpus.keys("instruction")[own])) == 1
        assert Counter(corpus.keys("split")[own].tolist())["train"] == 24
    assert len(set(corpus.keys("category"))) >= 8


def test_questions_and_answers_are_short_and_all_different(corpus):
    examples = corpus.examples(range(len(corpus)))
    assert all(0 < len(example.input) <= 350 for example in examples)
    assert all(0 < len(example.output) <= 40 for example in examples)
    assert len({example.input for example in examples}) == len(examples)


def test_no_family_has_one_answer_to_everything(corpus):
    for client in FAMILIES:
        rows = (corpus.keys("client") == client).nonzero()[0]
        answers = Counter(example.output for example in corpus.examples(rows))
        assert answers.most_common(1)[0][1] <= 25, client


def test_answers_are_right_where_they_are_easy_to_check(corpus):
    for client, wanted in {
        "spell_backward": lambda question: question.split()[-1][::-1],
        "count_bits": lambda question: str(int(question.rstrip("?").split()[-1]).bit_count()),
        "word_sequence_reversal": lambda question: ", ".join(
            question.split(": ")[1].split(", ")[::-1]
        ),
    }.items():
        rows = (corpus.keys("client") == client).nonzero()[0]
        for example in corpus.examples(rows):
            assert example.output == wanted(example.input)


def test_a_familys_rows_depend_on_no_other_family(corpus):
    alone = generate(["gcd"], examples=30, seed=1)
    own = corpus.select(corpus.keys("client") == "gcd")
    assert alone.fingerprint() == own.fingerprint()
    assert generate(["gcd"], examples=30, seed=2).fingerprint() != own.fingerprint()


def test_another_process_generates_the_same(corpus):
    code = (
        "from flexlora.data.corpora.procedural import generate\n"
        "print(generate(examples=30, seed=1).fingerprint())"
    )
    process = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert process.stdout.split()[-1] == corpus.fingerprint()


def test_what_cannot_be_generated_is_refused(monkeypatch):
    with pytest.raises(ValueError, match=r"no family 'gdc'. Did you mean 'gcd'"):
        generate(["gdc"], examples=3, seed=1)
    with pytest.raises(ValueError, match="'color_cube_rotation' gave only 0 different"):
        generate(["color_cube_rotation"], examples=3, seed=1, max_prompt_chars=90)
    with pytest.raises(ValueError, match="Cannot generate 0 examples"):
        generate(examples=0, seed=1)
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ConfigError, match=r"pip install 'flexlora\[demo\]'"):
        generate(["gcd"], examples=3, seed=1)
