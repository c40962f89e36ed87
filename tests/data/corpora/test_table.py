import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from flexlora.data.corpora.table import Columns, read
from flexlora.data.corpus import Example

ROWS = [
    {
        "client": row % 3,
        "category": "sums" if row % 2 else "names",
        "split": "test" if row % 5 == 0 else "train",
        "instruction": f"Do, «{row % 3}»",
        "input": 'a "quoted"\nline, and a comma' if row == 7 else f"input {row}",
        "output": "" if row == 11 else f"out {row}",
    }
    for row in range(13)
]
CHAT = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]

REAL = Path(__file__).parents[3].parent / "shared" / "data" / "natural-instructions"
needs_real = pytest.mark.skipif(
    not REAL.is_dir(), reason="needs the Natural Instructions files beside the repository"
)


def write(folder, suffix, rows=ROWS):
    path = folder / f"rows{suffix}"
    if suffix == ".parquet":
        table = pa.Table.from_pylist(rows)
        for name in {"category", "instruction"} & set(table.column_names):
            place = table.column_names.index(name)
            table = table.set_column(place, name, table[name].dictionary_encode())
        pq.write_table(table, path)
    elif suffix == ".csv":
        pyarrow.csv.write_csv(pa.Table.from_pylist(rows), path)
    elif suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    else:
        lines = "\n".join(json.dumps(row) for row in rows)
        path.write_text(lines + "\n\n", encoding="utf-8")
    return path


SUFFIXES = pytest.mark.parametrize("suffix", [".parquet", ".csv", ".json", ".jsonl"])


@SUFFIXES
def test_every_format_gives_the_same_corpus(tmp_path, suffix):
    corpus = read(write(tmp_path, suffix))
    assert corpus.keys("client").tolist() == [str(row % 3) for row in range(13)]
    assert corpus.keys("split").tolist() == [row["split"] for row in ROWS]
    assert corpus.example(7) == Example("Do, «1»", ROWS[7]["input"], "out 7")
    assert corpus.example(11).output == ""
    assert corpus.fingerprint() == read(write(tmp_path, ".parquet")).fingerprint()


@SUFFIXES
def test_only_the_rows_of_the_clients_asked_for_are_read(tmp_path, suffix):
    path = write(tmp_path, suffix)
    some = read(path, clients=["2", "0"])
    whole = read(path)
    assert some.fingerprint() == whole.select(whole.keys("client") != "1").fingerprint()
    for stranger in ("7", "seven"):
        with pytest.raises(ValueError, match=rf"no rows of 1 of the selected.*'{stranger}'"):
            read(path, clients=["0", stranger])


@SUFFIXES
def test_clients_named_by_text_are_chosen_too(tmp_path, suffix):
    path = write(tmp_path, suffix, [{**row, "client": f"c{row['client']}"} for row in ROWS])
    assert len(read(path, clients=["c2"])) == 4
    by_category = read(path, Columns(client="category"), clients=["names"])
    assert by_category.keys("client").tolist() == ["names"] * 7
    assert by_category.keys("category").tolist() == ["names"] * 7


@SUFFIXES
def test_columns_go_by_other_names_or_are_absent(tmp_path, suffix):
    rows = [{"question": f"q{row}", "answer": f"a{row}"} for row in range(5)]
    columns = Columns(
        instruction=None,
        input="question",
        output="answer",
        client=None,
        category=None,
        split=None,
    )
    corpus = read(write(tmp_path, suffix, rows), columns)
    assert corpus.columns == ("input", "output", "instruction")
    assert corpus.example(3) == Example("", "q3", "a3")
    with pytest.raises(ValueError, match="no key column 'client'"):
        corpus.keys("client")
    with pytest.raises(ValueError, match=r"set data.columns.client"):
        read(write(tmp_path, suffix, rows), columns, clients=["1"])


@pytest.mark.parametrize("suffix", [".parquet", ".json", ".jsonl"])
def test_conversations_may_be_nested(tmp_path, suffix):
    rows = [{"client": "a", "turns": CHAT}, {"client": "b", "turns": [CHAT[0], *CHAT]}]
    columns = Columns(messages="turns", category=None, split=None)
    corpus = read(write(tmp_path, suffix, rows), columns)
    assert corpus.example(0) == Example("", "", "Because.", tuple(CHAT))
    assert len(corpus.example(1).messages) == 3


@SUFFIXES
def test_a_missing_column_is_named_with_the_nearest(tmp_path, suffix):
    rows = [{("instructions" if k == "instruction" else k): v for k, v in ROWS[0].items()}]
    with pytest.raises(ValueError) as refusal:
        read(write(tmp_path, suffix, rows))
    text = str(refusal.value)
    assert f"rows{suffix}" in text
    assert "no column 'instruction'" in text
    assert "instructions, input, output" in text
    assert "Did you mean 'instructions'?" in text


def test_faulty_values_are_refused_with_their_row(tmp_path):
    null = [*ROWS[:4], {**ROWS[4], "output": None}]
    with pytest.raises(ValueError, match=r"rows.parquet' is null in row 5"):
        read(write(tmp_path, ".parquet", null))
    with pytest.raises(ValueError, match=r"rows.jsonl', row 5, has null in .* 'output'"):
        read(write(tmp_path, ".jsonl", null))
    numbers = [*ROWS[:2], {**ROWS[2], "output": 7}]
    with pytest.raises(ValueError, match=r"row 3, has 7, a int in .*the output must be text"):
        read(write(tmp_path, ".json", numbers))
    with pytest.raises(ValueError, match=r"'output' of .* has the type int64, but .*row is 7"):
        read(write(tmp_path, ".parquet", [{**row, "output": 7} for row in ROWS]))
    with pytest.raises(ValueError, match=r"has True, a bool"):
        read(write(tmp_path, ".jsonl", [{**ROWS[0], "client": True}]))
    with pytest.raises(ValueError, match="contains 'dev'; the splits are"):
        read(write(tmp_path, ".csv", [{**ROWS[0], "split": "dev"}]))


def test_a_file_that_is_no_table_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"suffix '.txt'; rename it to one of .parquet"):
        read(tmp_path / "rows.txt")
    with pytest.raises(ValueError, match="There is no file"):
        read(tmp_path / "rows.csv")
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n{oops\n")
    with pytest.raises(ValueError, match=r"Line 2 of .* is not JSON"):
        read(path)
    path.write_text("[1]\n")
    with pytest.raises(ValueError, match=r"row 1, is .1.; it must be a JSON object"):
        read(path)
    with pytest.raises(ValueError, match="both are None"):
        Columns(output=None)


@needs_real
def test_the_published_federation_is_read():
    sample = read(REAL / "sample.parquet")
    assert len(sample) == 4096
    assert len(np.unique(sample.keys("client"))) == 64
    train = sample.select(sample.keys("split") == "train")
    assert len(train) == 64 * 48
    assert len(set(train.keys("instruction"))) == 64


@needs_real
def test_few_clients_of_many_are_read_alone():
    some = read(REAL / "clients.parquet", clients=["3", "1300"])
    assert set(some.keys("client")) == {"3", "1300"}
    assert len(some) < 1300
