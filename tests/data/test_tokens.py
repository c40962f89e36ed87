import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexlora.data import tokens
from flexlora.data.corpus import Corpus, Example
from flexlora.data.encoding import encode, shorten
from flexlora.data.prompts import alpaca, named, plain
from flexlora.data.tokens import TokenStore

from .conftest import byte_tokenizer, small_corpus


def test_prompt_and_response_meet_at_the_border(tokenizer):
    encoded = encode(Example("Add.", "1 and 2", "the sum"), alpaca, tokenizer, 1000)
    assert tokenizer.decode(encoded.prompt).endswith("### Response:\n")
    assert tokenizer.decode(encoded.response) == "the sum<|end|>"
    assert encoded.ids.dtype == np.int32
    assert len(encoded) == len(encoded.prompt) + len(encoded.response)


def test_an_empty_response_is_its_end_alone(tokenizer):
    encoded = encode(Example("Add.", "", ""), named("chat", tokenizer), tokenizer, 1000)
    assert encoded.response.tolist() == [tokenizer.eos_token_id]


def test_the_beginning_is_set_once_and_only_if_the_tokenizer_does():
    adds = byte_tokenizer(adds_bos=True)
    example = Example("<|begin|>Add.", "", "3")
    begin = adds.bos_token_id
    assert encode(example, plain, adds, 99).ids.tolist().count(begin) == 1
    encoded = encode(Example("Add.", "", "3"), plain, adds, 99)
    assert encoded.ids[0] == begin
    assert begin not in encoded.ids[1:]
    silent = encode(Example("Add.", "", "3"), plain, byte_tokenizer(), 99)
    assert silent.ids.tolist() == encoded.ids[1:].tolist()


def test_what_cannot_be_learned_is_refused(tokenizer):
    with pytest.raises(ValueError, match="prompt of row 1 has no tokens"):
        encode(Example("", "", "3"), plain, tokenizer, 99)
    endless = byte_tokenizer()
    endless.eos_token = None
    with pytest.raises(ValueError, match="set eos_token in its"):
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
    store = TokenStore.build(corpus, tokenizer, "alpaca", most, None)
    mapped = TokenStore.build(corpus, tokenizer, "alpaca", most, tmp_path)
    assert_same(store, mapped)
    assert isinstance(mapped.ids, np.memmap)
    assert len(store) == 17
    whole = [encode(corpus.example(row), alpaca, tokenizer, 9999) for row in range(17)]
    assert store.cut == sum(len(example) > most for example in whole) == (17 if most == 40 else 0)
    for row in range(17):
        alone = encode(corpus.example(row), alpaca, tokenizer, most)
        assert store[row].ids.tolist() == alone.ids.tolist()
        assert store[row].prompt_tokens == alone.prompt_tokens
        assert store.lengths[row] == len(alone)

    with pytest.raises(IndexError, match="no row 17"):
        store[17]


def test_a_store_is_encoded_once(corpus, tokenizer, tmp_path, monkeypatch):
    first = TokenStore.build(corpus, tokenizer, "chat", 77, tmp_path / "deep" / "cache")
    monkeypatch.setattr(tokens, "_rows", lambda *_: pytest.fail("encoded again"))
    again = TokenStore.build(corpus, tokenizer, "chat", 77, tmp_path / "deep" / "cache")
    assert_same(first, again)
    assert [path.name[0] for path in (tmp_path / "deep" / "cache").iterdir()] != ["."]


def test_whatever_changes_the_tokens_changes_the_store(tokenizer, tmp_path):
    corpus = small_corpus()
    other = corpus.with_column("input", ["x"] * len(corpus))
    other_chat = "{% for m in messages %}{{ m.content }} Answer: {% endfor %}"
    dated = byte_tokenizer(chat_template=other_chat)
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
    encode_all = tokens.encode_all

    def fails_later(examples, prompt, tokenizer, first):
        if first == 10:
            raise KeyboardInterrupt
        return encode_all(examples, prompt, tokenizer, first)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tokens, "encode_all", fails_later)
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
    with pytest.raises(ValueError, match="does not agree"):
        TokenStore.open(folder)
    (folder / "facts.json").write_text(json.dumps({"format": 0}))
    with pytest.raises(ValueError, match="delete the folder"):
        TokenStore.open(folder)


def test_an_empty_corpus_gives_an_empty_store(tokenizer, tmp_path):
    empty = Corpus.build({"instruction": [], "input": [], "output": []})
    assert len(TokenStore.build(empty, tokenizer, "plain", 50, None)) == 0
