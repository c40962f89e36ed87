import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexlora.data import tokens
from flexlora.data.corpus import Corpus, Example
from flexlora.data.prompt import alpaca, chat, plain
from flexlora.data.tokens import TokenStore, encode, pack, shorten, steps

from .conftest import byte_tokenizer, small_corpus


def store_of(sizes):
    """A store whose row i has prompt and response of these sizes, all ids different."""
    lengths = [p + r for p, r in sizes]
    return TokenStore(
        np.arange(100, 100 + sum(lengths), dtype=np.int32),
        np.cumsum([0, *lengths]),
        np.array([p for p, _ in sizes], np.int32),
        0,
    )


SIZES = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 7)), min_size=1, max_size=11)


def test_prompt_and_response_meet_at_the_border(tokenizer):
    found = encode(Example("Add.", "1 and 2", "the sum"), alpaca, tokenizer, 1000)
    assert tokenizer.decode(found.prompt).endswith("### Response:\n")
    assert tokenizer.decode(found.response) == "the sum<|end|>"
    assert found.ids.dtype == np.int32
    assert len(found) == len(found.prompt) + len(found.response)


def test_an_empty_response_is_its_end_alone(tokenizer):
    found = encode(Example("Add.", "", ""), chat(tokenizer), tokenizer, 1000)
    assert found.response.tolist() == [tokenizer.eos_token_id]


def test_the_beginning_is_set_once_and_only_if_the_tokenizer_does():
    adds = byte_tokenizer(adds_bos=True)
    example = Example("<|begin|>Add.", "", "3")
    begin = adds.bos_token_id
    assert encode(example, plain, adds, 99).ids.tolist().count(begin) == 1
    found = encode(Example("Add.", "", "3"), plain, adds, 99)
    assert found.ids[0] == begin
    assert begin not in found.ids[1:]
    silent = encode(Example("Add.", "", "3"), plain, byte_tokenizer(), 99)
    assert silent.ids.tolist() == found.ids[1:].tolist()


def test_what_cannot_be_learned_is_refused(tokenizer):
    with pytest.raises(ValueError, match="prompt of row 0 has no tokens"):
        encode(Example("", "", "3"), plain, tokenizer, 99)
    endless = byte_tokenizer()
    endless.eos_token = None
    with pytest.raises(ValueError, match="set its eos_token"):
        encode(Example("Add.", "", "3"), plain, endless, 99)
    with pytest.raises(ValueError, match="max_tokens is 1"):
        shorten([1], [2], 1)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(2, 50))
@settings(deadline=None)
def test_shortening_keeps_head_tail_and_half_a_response(prompt_size, response_size, most):
    prompt, response = list(range(prompt_size)), list(range(1000, 1000 + response_size))
    ids, border = shorten(prompt, response, most)
    kept_prompt, kept_response = ids[:border], ids[border:]
    assert len(ids) == min(most, prompt_size + response_size)
    assert border >= 1
    assert len(kept_response) >= min(response_size, most // 2)
    assert kept_response == response[: len(kept_response)]
    lost = prompt_size - border
    gap = (border + 1) // 2
    assert kept_prompt == prompt[:gap] + prompt[gap + lost :]


def assert_same(one, other):
    for name in ("ids", "offsets", "prompt_tokens"):
        assert np.array_equal(getattr(one, name), getattr(other, name))
    assert one.cut == other.cut


@pytest.mark.parametrize("most", [40, 1000])
def test_a_store_holds_what_encode_gives(corpus, tokenizer, most, tmp_path, monkeypatch):
    monkeypatch.setattr(tokens, "_ROWS_AT_ONCE", 5)
    held = TokenStore.build(corpus, tokenizer, "alpaca", most, None)
    mapped = TokenStore.build(corpus, tokenizer, "alpaca", most, tmp_path)
    assert_same(held, mapped)
    assert isinstance(mapped.ids, np.memmap)
    assert len(held) == 17
    whole = [encode(corpus.example(row), alpaca, tokenizer, 9999) for row in range(17)]
    assert held.cut == sum(len(example) > most for example in whole) == (17 if most == 40 else 0)
    for row in range(17):
        alone = encode(corpus.example(row), alpaca, tokenizer, most)
        assert held[row].ids.tolist() == alone.ids.tolist()
        assert held[row].prompt_tokens == alone.prompt_tokens
        assert held.lengths[row] == len(alone)
        assert held.response_tokens[row] == len(alone.response)
    with pytest.raises(IndexError, match="no row 17"):
        held[17]


def test_a_store_is_encoded_once(corpus, tokenizer, tmp_path, monkeypatch):
    first = TokenStore.build(corpus, tokenizer, "chat", 77, tmp_path / "deep" / "cache")
    monkeypatch.setattr(tokens, "_rows", lambda *_: pytest.fail("encoded again"))
    again = TokenStore.build(corpus, tokenizer, "chat", 77, tmp_path / "deep" / "cache")
    assert_same(first, again)
    assert [path.name[0] for path in (tmp_path / "deep" / "cache").iterdir()] != ["."]


def test_whatever_changes_the_tokens_changes_the_store(tokenizer, tmp_path):
    corpus = small_corpus()
    other = corpus.with_column("input", ["x"] * len(corpus))
    dated = byte_tokenizer(chat_template="{{ messages[0].content }} Answer: ")
    for arguments in [
        (corpus, tokenizer, "alpaca", 50),
        (corpus, tokenizer, "alpaca", 51),
        (corpus, tokenizer, "plain", 50),
        (corpus, tokenizer, "chat", 50),
        (corpus, dated, "chat", 50),
        (corpus, byte_tokenizer(adds_bos=True), "alpaca", 50),
        (other, tokenizer, "alpaca", 50),
    ]:
        TokenStore.build(*arguments, tmp_path)
    assert len(list(tmp_path.iterdir())) == 7
    # The chat template is no part of what the prompt "alpaca" writes.
    TokenStore.build(corpus, dated, "alpaca", 50, tmp_path)
    assert len(list(tmp_path.iterdir())) == 7


def test_a_call_that_pads_leaves_the_store_where_it_is(corpus, tmp_path):
    padding = byte_tokenizer()
    padding.pad_token = "<|end|>"
    TokenStore.build(corpus, padding, "plain", 50, tmp_path)
    padding(["one", "one two"], padding=True, truncation=True, max_length=2)
    TokenStore.build(corpus, padding, "plain", 50, tmp_path)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_crash_leaves_no_half_store(corpus, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(tokens, "_ROWS_AT_ONCE", 5)
    encode_all = tokens._encode_all

    def fails_later(examples, prompt, tokenizer, first):
        if first == 10:
            raise KeyboardInterrupt
        return encode_all(examples, prompt, tokenizer, first)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tokens, "_encode_all", fails_later)
        TokenStore.build(corpus, tokenizer, "plain", 50, tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert len(TokenStore.build(corpus, tokenizer, "plain", 50, tmp_path)) == 17


def test_who_finishes_second_takes_the_first_ones_store(corpus, tokenizer, tmp_path):
    TokenStore.build(corpus, tokenizer, "plain", 50, tmp_path)
    (folder,) = tmp_path.iterdir()
    rows = tokens._rows(corpus, plain, tokenizer, 50)
    tokens._write(folder, rows)
    assert list(tmp_path.iterdir()) == [folder]
    assert len(TokenStore.open(folder)) == 17


def test_a_damaged_store_is_refused(corpus, tokenizer, tmp_path):
    TokenStore.build(corpus, tokenizer, "plain", 50, tmp_path)
    (folder,) = tmp_path.iterdir()
    ids = folder / "ids.npy"
    ids.write_bytes(ids.read_bytes()[:-4])
    with pytest.raises(ValueError, match="delete the folder"):
        TokenStore.build(corpus, tokenizer, "plain", 50, tmp_path)
    np.save(ids, np.zeros(3, np.int32))
    with pytest.raises(ValueError, match="do not agree"):
        TokenStore.open(folder)
    (folder / "facts.json").write_text(json.dumps({"format": 0}))
    with pytest.raises(ValueError, match="delete the folder"):
        TokenStore.open(folder)


def test_an_empty_corpus_gives_an_empty_store(tokenizer, tmp_path):
    empty = Corpus.build({"instruction": [], "input": [], "output": []})
    assert len(TokenStore.build(empty, tokenizer, "plain", 50, None)) == 0


@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=40),
    st.integers(1, 13),
    st.integers(1, 47),
    st.data(),
)
@settings(deadline=None)
def test_an_epoch_takes_every_row_once(lengths, per_step, room, data):
    indices = data.draw(st.lists(st.sampled_from(range(len(lengths))), unique=True))
    plan = steps(lengths, indices, per_step, room, np.random.default_rng(1))
    assert sorted(row for step in plan for rows in step for row in rows) == sorted(indices)
    counts = [sum(len(rows) for rows in step) for step in plan]
    assert all(count == per_step for count in counts[:-1])
    assert len(counts) == -(-len(indices) // per_step)
    for step in plan:
        sums = [sum(lengths[row] for row in rows) for rows in step]
        for rows, total in zip(step, sums, strict=True):
            assert rows
            assert total <= room or len(rows) == 1
        # First fit: no pack's first row would have fitted an earlier pack as it then was.
        for early, late in zip(sums, step[1:], strict=False):
            assert early + lengths[late[0]] > room or early > room
    again = steps(lengths, indices, per_step, room, np.random.default_rng(1))
    assert plan == again


def test_steps_shuffle_and_refuse_nothing_by_order():
    plan = steps([3] * 29, range(29), 7, 9, np.random.default_rng(2))
    other = steps([3] * 29, range(29), 7, 9, np.random.default_rng(3))
    assert plan != other
    assert [len(step) for step in plan] == [3, 3, 3, 3, 1]
    with pytest.raises(ValueError, match="Steps of 0 examples"):
        steps([3], [0], 0, 9, np.random.default_rng(2))


@given(SIZES, st.booleans(), st.data())
@settings(deadline=None)
def test_a_pack_is_its_examples_one_after_the_other(sizes, prompt_loss, data):
    store = store_of(sizes)
    rows = data.draw(st.lists(st.sampled_from(range(len(sizes))), min_size=1, max_size=5))
    row = pack(store, rows, prompt_loss)
    assert row.tokens == row.input_ids.shape[1] == sum(sum(sizes[r]) for r in rows)
    labels, positions = row.labels.tolist(), row.loss_positions.tolist()
    at = 0
    for number, r in enumerate(rows):
        start, end = row.starts[number].item(), row.starts[number + 1].item()
        one = store[r]
        assert row.input_ids[0, start:end].tolist() == one.ids.tolist()
        assert row.position_ids[0, start:end].tolist() == list(range(end - start))
        learned = one.ids[1:] if prompt_loss else one.response
        assert labels[at : at + len(learned)] == learned.tolist()
        places = range(end - 1 - len(learned), end - 1)
        assert positions[at : at + len(learned)] == list(places)
        at += len(learned)
    assert at == len(labels) == len(positions)
    assert len(row.starts) == len(rows) + 1


def test_pack_gives_torch_integers():
    row = pack(store_of([(3, 2), (2, 5)]), [1, 0])
    for tensor in (
        row.input_ids,
        row.position_ids,
        row.starts,
        row.loss_positions,
        row.labels,
    ):
        assert tensor.dtype == torch.int64
    assert row.loss_positions.tolist() == [1, 2, 3, 4, 5, 9, 10]
    with pytest.raises(ValueError, match="no examples"):
        pack(store_of([(3, 2)]), [])
