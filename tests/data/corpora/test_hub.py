"""The package ``datasets`` is stood in for, since a test may not use the network."""

import sys
from types import SimpleNamespace

import pyarrow as pa
import pytest

from flexlora.data import Columns
from flexlora.data.corpora import hub
from flexlora.errors import ConfigError, DataError

COLUMNS = Columns(client="who")


class Rows:
    """What is used of ``datasets.Dataset``."""

    def __init__(self, start, rows):
        self.numbers = range(start, start + rows)

    def __len__(self):
        return len(self.numbers)

    def with_format(self, kind):
        assert kind == "arrow"
        return self

    def __getitem__(self, whole):
        return pa.table(
            {
                "who": [n % 2 for n in self.numbers],
                "instruction": ["Add."] * len(self.numbers),
                "input": [f"in {n}" for n in self.numbers],
                "output": [f"out {n}" for n in self.numbers],
            }
        )[whole]


@pytest.fixture
def installed(monkeypatch):
    calls = []

    def provide(**splits):
        def load_dataset(path, name, revision):
            calls.append((path, name, revision))
            return splits

        module = SimpleNamespace(load_dataset=load_dataset)
        monkeypatch.setitem(sys.modules, "datasets", module)
        return calls

    return provide


def test_the_hubs_splits_become_the_split(installed):
    calls = installed(train=Rows(0, 7), test=Rows(7, 3))
    corpus = hub.read("some/name", COLUMNS, subset="small", revision="abc")
    assert calls == [("some/name", "small", "abc")]
    assert corpus.keys("split").tolist() == ["train"] * 7 + ["test"] * 3
    assert corpus.keys("client").tolist() == ["0", "1"] * 5
    assert corpus.example(8).output == "out 8"


def test_a_single_split_is_left_to_be_split(installed):
    installed(train=Rows(0, 5))
    assert "split" not in hub.read("some/name", COLUMNS).columns


def test_splits_may_be_chosen_and_renamed(installed):
    installed(train=Rows(0, 7), dev=Rows(7, 3), extra=Rows(10, 2))
    splits = {"train": "train", "dev": "validation"}
    corpus = hub.read("some/name", COLUMNS, splits=splits)
    assert corpus.keys("split").tolist() == ["train"] * 7 + ["validation"] * 3
    with pytest.raises(ValueError, match="'some/name' has the split 'extra', which is not one of"):
        hub.read("some/name", COLUMNS)
    with pytest.raises(ValueError, match="no split 'tset'; it has train, dev, extra"):
        hub.read("some/name", COLUMNS, splits={"tset": "test"})


def test_a_missing_column_is_refused(installed):
    installed(train=Rows(0, 7))
    with pytest.raises(ValueError, match="dataset 'some/name', split 'train' has no column 'whom'"):
        hub.read("some/name", Columns(client="whom"))


def test_a_dataset_that_cannot_be_loaded_is_one_sentence(monkeypatch):
    def load_dataset(*args, **options):
        raise FileNotFoundError("Couldn't find\nany data file")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(DataError, match=r"'some/name' cannot be loaded.*find\); check") as refusal:
        hub.read("some/name", COLUMNS)
    assert "\n" not in str(refusal.value)


def test_without_the_package_the_remedy_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r'read without it: data.format = "table"'):
        hub.read(str(tmp_path), COLUMNS)
    with pytest.raises(ConfigError, match=r"pip install 'flexlora\[hub\]'"):
        hub.read("some/name", COLUMNS)
