import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexlora.evaluation.padded import batches, decode
from flexlora.model.source import Source
from support import models


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 50), max_size=40),
    st.integers(1, 20),
    st.integers(1, 400),
)
def test_batches_hold_every_prompt_once_within_the_budget(lengths, new, budget):
    result = batches(lengths, new, budget)
    assert sorted(row for rows in result for row in rows) == list(range(len(lengths)))
    for rows in result:
        assert len(rows) == 1 or len(rows) * (max(lengths[r] for r in rows) + new) <= budget
    in_order = [lengths[row] for rows in result for row in rows]
    assert in_order == sorted(lengths, reverse=True)


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return Source(str(models.save(tmp_path_factory.mktemp("tiny"))), attention="sdpa").load()


def test_published_settings_are_set_aside_and_put_back(other, prompts_of_words):
    published = other.model.generation_config
    written = decode(other, prompts_of_words, 7, (2, 3), 100)
    assert other.model.generation_config is published
    assert published.repetition_penalty == 3.0
    assert [len(part) for part in written] == [len(prompts_of_words)]
