import numpy as np
import pytest
import torch

from flexlora.evaluation import decoding, padded
from flexlora.evaluation.decoding import decode
from flexlora.evaluation.generation import answers_of_each
from flexlora.evaluation.kv_cache import DecodeStep
from flexlora.evaluation.prefix_tree import tree
from flexlora.model import proof
from support import families, models

NEW = 11
STOPS = (2, 3)

_DRAW = np.random.default_rng(4)


def drawn(size: int) -> list[int]:
    return _DRAW.integers(3, 15, size=size).tolist()


COMMON, OTHER = drawn(19), drawn(13)
CASES = {
    "one prompt": [drawn(7)],
    "one token": [[5]],
    "strangers": [drawn(n) for n in (3, 11, 1, 7, 29)],
    "one prefix": [COMMON + drawn(n) for n in (2, 5, 1, 9)],
    "equal to the prefix": [COMMON, COMMON + drawn(3), COMMON],
    "two prefixes and a stranger": [
        OTHER + drawn(4),
        COMMON + drawn(6),
        drawn(8),
        COMMON + drawn(2),
        OTHER + drawn(1),
    ],
    "a prefix in a prefix": [
        COMMON + OTHER + drawn(2),
        COMMON + drawn(5),
        COMMON + OTHER + drawn(7),
        COMMON + OTHER,
        COMMON[:17],
    ],
}


def arrays(prompts: list[list[int]]) -> list[np.ndarray]:
    return [np.array(ids, np.int32) for ids in prompts]


def alone(base, prompt: list[int], new: int = NEW, stops=STOPS) -> list[int]:
    """All of the prompt again for each token, without a cache or anything shared."""
    ids, written = list(prompt), []
    with torch.no_grad():
        while len(written) < new and not (written and written[-1] in stops):
            out = base.model(input_ids=torch.tensor([ids]), use_cache=False)
            written.append(int(out.logits[0, -1].argmax()))
            ids.append(written[-1])
    return written


@pytest.mark.parametrize("room", [1, 90, 10_000])
@pytest.mark.parametrize("case", CASES)
def test_answers_are_those_of_each_prompt_alone(base, adapter, case, room):
    prompts = CASES[case]
    with base.attached(adapter):
        expected = [alone(base, prompt) for prompt in prompts]
        assert decode(base, arrays(prompts), NEW, STOPS, room) == [expected]


@pytest.mark.parametrize("room", [1, 200, 10_000])
def test_several_adapters_at_once_answer_as_each_alone(base, adapter, room):
    prompts = arrays([prompt for case in CASES.values() for prompt in case])
    adapters = [{m: f.first(rank) for m, f in adapter.items()} for rank in (3, 1, 2)]
    expected = []
    for one in adapters:
        with base.attached(one):
            expected += decode(base, prompts, NEW, STOPS, 10_000)
    with base.attached(*adapters):
        assert decode(base, prompts, NEW, STOPS, room, adapters=3) == expected
    assert expected[0] != expected[1] != expected[2]


def test_some_answers_end_by_themselves_and_some_at_the_limit(base):
    prompts = [prompt for case in CASES.values() for prompt in case]
    (answers,) = decode(base, arrays(prompts), NEW, STOPS, 500)
    ended = [ids[-1] in STOPS for ids in answers]
    assert any(ended)
    assert not all(ended)
    assert all(len(ids) == NEW for ids, end in zip(answers, ended, strict=True) if not end)
    assert all(token not in STOPS for ids in answers for token in ids[:-1])


@pytest.fixture
def shapes(base, monkeypatch):
    """The shapes of all that the model is given."""
    seen = []
    forward = base.model.forward
    monkeypatch.setattr(
        base.model,
        "forward",
        lambda *a, **k: seen.append(tuple(k["input_ids"].shape)) or forward(*a, **k),
    )
    return seen


def test_what_prompts_share_is_read_once_and_ended_answers_leave(base, shapes):
    prompts = CASES["a prefix in a prefix"]
    expected = [alone(base, prompt) for prompt in prompts]
    shapes.clear()
    assert decode(base, arrays(prompts), NEW, STOPS, 10_000) == [expected]
    read = sum(node.tokens for node in tree(arrays(prompts)))
    assert read < sum(map(len, prompts)) / 2
    steps = max(map(len, expected)) - 1
    going_on = [(sum(len(ids) > n + 1 for ids in expected), 1) for n in range(steps)]
    assert shapes == [(1, read), *going_on]
    assert going_on[0] != going_on[-1]


def test_without_room_for_all_the_next_come_in_when_others_leave(base, shapes):
    prompts = CASES["strangers"]
    shapes.clear()
    decode(base, arrays(prompts), NEW, STOPS, 1)
    reads = [shape for shape in shapes if shape[1] > 1 or shape == (1, 1)]
    assert [tokens for _, tokens in reads if tokens > 1] == [29, 11, 7, 3]
    assert all(rows == 1 for rows, _ in shapes)


def test_the_model_has_its_own_attention_again(base, monkeypatch):
    own = base.model.config._attn_implementation
    decode(base, arrays(CASES["one prompt"]), 2, STOPS, 50)
    assert base.model.config._attn_implementation == own
    monkeypatch.setattr(decoding, "_prefill", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        decode(base, arrays(CASES["one prompt"]), 2, STOPS, 50)
    assert base.model.config._attn_implementation == own


def test_models_with_layers_that_cannot_be_cached_are_left_to_generate(base, monkeypatch):
    prompts = arrays(CASES["one prefix"])
    expected = answers_of_each(base, 1, prompts, NEW, 500)
    monkeypatch.setattr(base.model.config, "num_hidden_layers", 5)
    with pytest.raises(decoding.UncachedLayersError):
        decode(base, prompts, 2, STOPS, 50)
    monkeypatch.setattr(padded, "decode", lambda *_: [[[7, 2] for _ in prompts]])
    assert answers_of_each(base, 1, prompts, NEW, 500) != expected


def test_a_cache_that_gives_other_answers_is_found(monkeypatch):
    """A window that is forgotten while answers are written: ``generate`` writes them then."""
    model = families.build("mistral", {"sliding_window": families.WINDOW})
    base = proof.proven(model, models.words_tokenizer(), "mistral")
    prompts = arrays([[*range(3, 15), *range(3, 9)], [*range(9, 15), *range(3, 9)]])
    right = decode(base, prompts, NEW, STOPS, 500)
    assert decoding.checked(base, prompts, NEW, STOPS, 500) == right
    assert padded.decode(base, prompts, NEW, STOPS, 500) == right
    monkeypatch.setattr(DecodeStep, "_mask", lambda step, number, layer: step.masks[number])
    assert decode(base, prompts, NEW, STOPS, 500) != right
    assert decoding.checked(base, prompts, NEW, STOPS, 500) is None
    expected = [base.tokenizer.decode(ids, skip_special_tokens=True) for ids in right[0]]
    assert answers_of_each(base, 1, prompts, NEW, 500) == [[text.strip() for text in expected]]
