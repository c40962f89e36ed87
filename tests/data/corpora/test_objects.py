"""Rows from Python. The packages of other frames are stood in for by what they offer."""

import math

import numpy as np
import pyarrow as pa
import pytest

from flexlora.data import Columns, Corpus
from flexlora.data.corpora.objects import read
from flexlora.data.corpus import Example
from flexlora.errors import DataError

ROWS = [
    {"who": f"c{row % 2}", "question": f"q{row}", "context": "", "answer": row} for row in range(5)
]
COLUMNS = Columns(client="who")


class Arrow:
    """A frame of Polars, or of a recent pandas: it exports itself."""

    def __init__(self, table):
        self.table = table

    def __arrow_c_stream__(self, requested_schema=None):
        return self.table.__arrow_c_stream__(requested_schema)


class Frame:
    """A frame of an older pandas, or with values of mixed types."""

    columns = ("question", "answer")

    def to_dict(self, orient):
        assert orient == "records"
        return [{"question": "a", "answer": 1}, {"question": math.nan, "answer": "b"}]


class Dataset:
    """What is used of ``datasets.Dataset``."""

    column_names = tuple(ROWS[0])

    def __init__(self, table):
        self.table = table

    def with_format(self, kind):
        assert kind == "arrow"
        return self.table

    def __len__(self):
        return len(self.table)


class Streamed:
    """What is used of ``datasets.IterableDataset``, which has no length and no rows by number."""

    column_names = None

    def __init__(self, rows):
        self.rows = rows

    def with_format(self, kind):
        raise AssertionError("a streamed dataset has no table")

    def __iter__(self):
        return iter(self.rows)


TABLE = pa.Table.from_pylist(ROWS)


@pytest.mark.parametrize(
    "rows",
    [
        ROWS,
        tuple(ROWS),
        (row for row in ROWS),
        {name: [row[name] for row in ROWS] for name in ROWS[0]},
        {name: np.array([row[name] for row in ROWS]) for name in ROWS[0]},
        TABLE,
        Arrow(TABLE),
        Dataset(TABLE),
        Streamed(ROWS),
    ],
    ids=[
        *("list", "tuple", "generator", "columns", "arrays"),
        *("arrow", "exported", "dataset", "streamed"),
    ],
)
def test_every_form_of_rows_gives_the_same_corpus(rows):
    corpus = read(rows, COLUMNS)
    assert corpus.keys("client").tolist() == ["c0", "c1", "c0", "c1", "c0"]
    assert corpus.example(3) == Example("q3", "", "3")


def test_a_frame_with_missing_values_is_read():
    corpus = read(Frame())
    assert corpus.examples([0, 1]) == [Example("a", "", "1"), Example("", "", "b")]


def test_a_dict_of_datasets_has_their_splits():
    corpus = read({"train": Dataset(TABLE), "test": Dataset(TABLE.slice(0, 2))}, COLUMNS)
    assert corpus.keys("split").tolist() == ["train"] * 5 + ["test"] * 2
    assert "split" not in read({"train": Dataset(TABLE)}, COLUMNS).columns
    streamed = read({"train": Streamed(ROWS), "test": Streamed(ROWS[:2])}, COLUMNS)
    assert streamed.keys("split").tolist() == ["train"] * 5 + ["test"] * 2


def test_a_corpus_stays_as_it_is():
    corpus = Corpus.build({"instruction": ["a"], "input": [""], "output": ["b"]})
    assert read(corpus) is corpus


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (3, "are a int; give a list of dicts"),
        ("text", "are a str"),
        ([], "or there are none"),
        ([["a", "b"]], "are list and not dicts"),
        (TABLE.slice(0, 0), "are none; give at least one"),
        ({"question": ["a"], "answer": ["b", "c"]}, "columns of different lengths"),
        ([{"question": "a", "answer": "b"}, {"question": "a"}], "row 2, has no output"),
        ([{"question": "a", "answer": "b"}, 3], "row 2, is 3; it must be a JSON object"),
        ([{1: "a", "answer": "b"}], "not named by text"),
    ],
)
def test_what_cannot_be_read_is_refused(rows, message):
    with pytest.raises(DataError, match=message):
        read(rows)
