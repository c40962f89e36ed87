import json

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexlora.data.corpus import Corpus, Example, split_rows

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "Because."},
]


def columns(rows):
    return {
        "client": [client for client, _ in rows],
        "instruction": ["Do."] * len(rows),
        "input": [text for _, text in rows],
        "output": [text[::-1] for _, text in rows],
    }


ROWS = st.lists(st.tuples(st.sampled_from(["a", "b", "ü"]), st.text(max_size=5)), max_size=13)


def test_examples_come_in_the_order_asked_for(corpus):
    assert len(corpus) == 17
    assert corpus.example(5) == Example("Task 2.", "input 5 ", "out 5")
    assert [example.output for example in corpus.examples([11, 2, 11])] == [
        "out 11",
        "out 2",
        "out 11",
    ]
    assert corpus.example(5).messages is None


def test_keys_are_strings_of_every_row(corpus):
    assert corpus.keys("client").tolist() == [f"c{row % 3}" for row in range(17)]
    with pytest.raises(ValueError, match="no key column 'output'"):
        corpus.keys("output")


@given(ROWS, st.data())
@settings(deadline=None, max_examples=60)
def test_codes_number_the_values_as_they_appear(rows, data):
    whole = Corpus.build(columns(rows))
    cut = data.draw(st.integers(0, len(rows)))
    loose = Corpus(pa.concat_tables([whole.table.slice(0, cut), whole.table.slice(cut)]))
    part = Corpus(whole.table.slice(cut))
    for corpus, expected in ((whole, rows), (loose, rows), (part, rows[cut:])):
        codes, values = corpus.codes("client")
        assert values == list(dict.fromkeys(client for client, _ in expected))
        assert [values[code] for code in codes] == [client for client, _ in expected]


def test_select_takes_indices_and_masks(corpus):
    mask = corpus.keys("client") == "c1"
    by_mask = corpus.select(mask)
    assert [e.output for e in by_mask.examples(range(len(by_mask)))] == [
        f"out {row}" for row in range(1, 17, 3)
    ]
    assert corpus.select(np.flatnonzero(mask)).fingerprint() == by_mask.fingerprint()
    assert len(corpus.select([])) == 0
    with pytest.raises(ValueError, match="mask of 2 values cannot choose among 17"):
        corpus.select(np.array([True, False]))


@given(ROWS, st.data())
@settings(deadline=None, max_examples=60)
def test_fingerprint_is_of_the_content_alone(rows, data):
    whole = Corpus.build(columns(rows))
    cut = data.draw(st.integers(0, len(rows)))
    chunks = {
        name: pa.chunked_array([values[:cut], values[cut:]], pa.string())
        for name, values in columns(rows).items()
    }
    assert Corpus.build(chunks).fingerprint() == whole.fingerprint()
    loose = pa.concat_tables([whole.table.slice(0, cut), whole.table.slice(cut)])
    assert Corpus(loose).fingerprint() == whole.fingerprint()
    sliced = Corpus(whole.table.slice(cut))
    assert sliced.fingerprint() == Corpus.build(columns(rows[cut:])).fingerprint()
    other = data.draw(ROWS)
    same = Corpus.build(columns(other)).fingerprint() == whole.fingerprint()
    assert same == (other == rows)


def test_fingerprint_sees_where_one_text_ends():
    one = {"instruction": ["", ""], "input": ["ab", "c"], "output": ["", ""]}
    other = {**one, "input": ["a", "bc"]}
    assert Corpus.build(one).fingerprint() != Corpus.build(other).fingerprint()


def test_conversations_keep_their_messages():
    corpus = Corpus.build({"client": ["a"], "messages": [json.dumps(CHAT)]})
    example = corpus.example(0)
    assert example.messages == tuple(CHAT)
    assert (example.instruction, example.input, example.output) == ("", "", "Because.")


@pytest.mark.parametrize(
    ("messages", "fault"),
    [
        ("{", "not JSON"),
        (json.dumps(CHAT[:1]), "at least two"),
        (json.dumps(CHAT[:2]), "last message must have the role 'assistant', not 'user'"),
        (json.dumps([*CHAT[:2], {"role": "assistant"}]), "the keys 'role' and 'content'"),
        (json.dumps([*CHAT[:2], {"role": "assistant", "content": 3}]), "must be text"),
    ],
)
def test_a_broken_conversation_is_refused_by_row(messages, fault):
    with pytest.raises(ValueError, match=f"'messages' of here, row 2: .*{fault}"):
        Corpus.build({"messages": [json.dumps(CHAT), messages]}, "here")


def test_faulty_columns_are_refused():
    fine = columns([("a", "x"), ("b", "y")])
    with pytest.raises(ValueError, match="'input' of here needs text, but row 2 has null"):
        Corpus.build({**fine, "input": ["x", None]}, "here")
    with pytest.raises(ValueError, match=r"'output' of here is null in row 1.*2 in total"):
        Corpus.build({**fine, "output": pa.nulls(2, pa.string())}, "here")
    with pytest.raises(ValueError, match="contains 'dev'; the splits are train"):
        Corpus.build({**fine, "split": ["train", "dev"]})
    with pytest.raises(ValueError, match="differ in length"):
        Corpus.build({**fine, "client": ["a"]})
    with pytest.raises(ValueError, match="'messages' or 'instruction'"):
        Corpus.build({"input": ["x"], "output": ["y"]})
    with pytest.raises(ValueError, match="column 'colour'"):
        Corpus(Corpus.build(fine).table.append_column("colour", pa.array(["red", "blue"])))


def test_with_column_sets_clients(corpus):
    given = corpus.with_column("client", [str(row // 6) for row in range(17)])
    assert given.keys("client").tolist() == ["0"] * 6 + ["1"] * 6 + ["2"] * 5
    assert given.keys("category").tolist() == corpus.keys("category").tolist()


def test_a_column_replaced_is_hashed_anew_and_the_others_are_not(corpus):
    digests = {name: corpus.digest(name) for name in corpus.columns}
    cached = Corpus(corpus.table, {**digests, "input": "as if it were large"})
    owners = [str(row % 5) for row in range(17)]
    changed = cached.with_column("client", owners)
    assert changed.digests == {**{n: digests[n] for n in digests if n != "client"}} | {
        "input": "as if it were large"
    }
    assert changed.digest("client") == corpus.with_column("client", owners).digest("client")
    assert changed.fingerprint() != cached.fingerprint() != corpus.fingerprint()
    assert cached.select([2, 3]).fingerprint() == corpus.select([2, 3]).fingerprint()
    with pytest.raises(ValueError, match="differ in length"):
        cached.with_column("client", ["a"])


def test_repetitive_columns_cost_little():
    rows = 20_000
    long = "An instruction of many words. " * 30
    texts = {"instruction": [long] * rows, "input": ["x"] * rows, "output": ["y"] * rows}
    assert Corpus.build({"client": ["a"] * rows, **texts}).table.nbytes < 40 * rows


@given(st.lists(st.integers(1, 37), min_size=1, max_size=5), st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_splits_are_eighty_ten_ten_in_every_client(sizes, seed):
    clients = [f"c{number}" for number, size in enumerate(sizes) for _ in range(size)]
    mixed = np.random.default_rng(seed).permutation(clients).tolist()
    corpus = Corpus.build(columns([(client, "x") for client in mixed]))
    split = split_rows(corpus, seed)
    for number, size in enumerate(sizes):
        kinds = split.keys("split")[split.keys("client") == f"c{number}"].tolist()
        assert kinds.count("train") >= 1
        assert kinds.count("test") == kinds.count("validation")
        assert abs(kinds.count("test") - size / 10) <= 0.5
    assert split_rows(corpus, seed).fingerprint() == split.fingerprint()


def test_a_clients_split_depends_on_no_other_client():
    both = split_rows(Corpus.build(columns([("a", "x"), ("b", "y")] * 29)), 5)
    alone = split_rows(Corpus.build(columns([("a", "x")] * 29)), 5)
    assert both.keys("split")[both.keys("client") == "a"].tolist() == alone.keys("split").tolist()
    other = split_rows(Corpus.build(columns([("a", "x")] * 29)), 6)
    assert other.keys("split").tolist() != alone.keys("split").tolist()


def test_rows_that_are_split_are_not_split_again(corpus):
    with pytest.raises(ValueError, match=r"'split' column; set data\.columns\.split = \"\""):
        split_rows(corpus, 1)
