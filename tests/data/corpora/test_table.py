import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from flexlora.data import Columns
from flexlora.data.corpora.table import read
from flexlora.data.corpus import Example
from flexlora.errors import DataError

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
    columns = Columns(instruction="", input="question", output="answer")
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
    columns = Columns(messages="turns")
    corpus = read(write(tmp_path, suffix, rows), columns)
    assert corpus.example(0) == Example("", "", "Because.", tuple(CHAT))
    assert len(corpus.example(1).messages) == 3


@SUFFIXES
def test_a_missing_column_is_named_with_the_nearest(tmp_path, suffix):
    with pytest.raises(ValueError) as refusal:
        read(write(tmp_path, suffix), Columns(client="clint", output="answer"))
    text = str(refusal.value)
    assert f"rows{suffix}" in text
    assert "no column 'answer' (data.columns.output), 'clint' (data.columns.client)" in text
    assert "client, category, split, instruction, input, output" in text
    assert "Did you mean 'client'?" in text and 'or to ""' in text


@pytest.mark.parametrize(
    ("suffix", "place"), [(".parquet", "row 5"), (".json", "row 5"), (".jsonl", "line 5")]
)
def test_a_null_response_is_refused_with_its_row_and_the_number_of_such_rows(
    tmp_path, suffix, place
):
    rows = [
        {**row, "output": None} if row["input"] in ("input 4", "input 9") else row for row in ROWS
    ]
    with pytest.raises(DataError) as refusal:
        read(write(tmp_path, suffix, rows))
    assert f"rows{suffix}', {place}, has no output" in str(refusal.value)
    assert "and in 1 more rows; fill in the output" in str(refusal.value)


@pytest.mark.parametrize("suffix", [".parquet", ".json", ".jsonl"])
def test_a_null_input_or_instruction_is_empty_and_a_null_category_has_a_name(tmp_path, suffix):
    rows = [{**ROWS[3], "input": None, "category": None}, {**ROWS[4], "instruction": None}]
    corpus = read(write(tmp_path, suffix, rows))
    assert [(e.instruction, e.input) for e in corpus.examples([0, 1])] == [
        ("Do, «0»", ""),
        ("", "input 4"),
    ]
    assert corpus.keys("category").tolist() == ["none", "names"]


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_a_key_that_some_records_do_not_have_is_empty_there(tmp_path, suffix):
    rows = [{k: v for k, v in ROWS[0].items() if k != "input"}, ROWS[1]]
    assert [e.input for e in read(write(tmp_path, suffix, rows)).examples([0, 1])] == [
        "",
        "input 1",
    ]


def test_numbers_are_text_as_they_are_written(tmp_path):
    path = tmp_path / "rows.jsonl"
    values = ["46", "4.50", "1e-7", "true", '"x"', "12345678901234567890123"]
    path.write_text("".join(f'{{"instruction": "a", "output": {v}}}\n' for v in values))
    outputs = [example.output for example in read(path).examples(range(6))]
    assert outputs == ["46", "4.50", "1e-7", "true", "x", "12345678901234567890123"]
    write(tmp_path, ".parquet", [{**row, "output": 7} for row in ROWS])
    assert read(tmp_path / "rows.parquet").example(2).output == "7"
    write(tmp_path, ".parquet", [{**row, "output": 0.1, "client": 3.0} for row in ROWS])
    corpus = read(tmp_path / "rows.parquet")
    assert corpus.example(2).output == "0.1" and corpus.keys("client")[0] == "3"


def test_what_is_no_text_is_refused(tmp_path):
    lists = [*ROWS[:2], {**ROWS[2], "output": ["a", "b"]}]
    with pytest.raises(DataError, match=r'row 3, has \["a", "b"\] in .*text and not a list'):
        read(write(tmp_path, ".json", lists))
    with pytest.raises(DataError, match="must be text and not a list"):
        read(write(tmp_path, ".parquet", [{**row, "output": ["a"]} for row in ROWS]))
    with pytest.raises(DataError, match="contains 'later'; the splits are"):
        read(write(tmp_path, ".csv", [{**ROWS[0], "split": "later"}]))


def test_usual_names_of_splits_are_understood(tmp_path):
    rows = [{**ROWS[0], "split": name} for name in ("Train", "dev", "val", "test", "eval")]
    splits = read(write(tmp_path, ".csv", rows)).keys("split").tolist()
    assert splits == ["train", "validation", "validation", "test", "validation"]


def test_rows_of_tables_by_polars_and_spark_are_read(tmp_path):
    text = {"instruction": ["a", "b"], "output": ["c", "d"]}
    moments = pa.array([0, 86_400_000_000], pa.timestamp("us", "UTC"))
    for kind in (
        pa.large_string(),
        pa.string_view(),
        pa.binary(),
        pa.dictionary(pa.int8(), pa.string()),
    ):
        table = pa.table({name: pa.array(v).cast(kind) for name, v in text.items()})
        pa_file = tmp_path / "rows.parquet"
        if kind == pa.string_view():
            pa_file = tmp_path / "rows.arrow"
            with pa.ipc.new_file(pa_file, table.schema) as file:
                file.write_table(table)
        else:
            pq.write_table(table.append_column("client", moments), pa_file)
            assert len(set(read(pa_file).keys("client"))) == 2
        assert read(pa_file).example(1) == Example("b", "", "d")


def test_a_file_that_is_no_table_is_refused(tmp_path):
    with pytest.raises(DataError, match="There is no file"):
        read(tmp_path / "rows.csv")
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n{oops\n")
    with pytest.raises(
        DataError, match=r"rows.jsonl', line 2, is not JSON at character 2"
    ) as refusal:
        read(path)
    assert "Expecting" not in str(refusal.value)
    path.write_text("[1]\n")
    with pytest.raises(DataError, match=r"row 1, is 1; it must be a JSON object"):
        read(path)
    path.write_text('{"instruction": "a", "output": "b", "output": "c"}\n')
    with pytest.raises(DataError, match="has the key 'output' twice"):
        read(path)
    with pytest.raises(DataError, match='sets both to ""'):
        Columns(output="", messages="")


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


def test_half_a_character_is_refused_with_its_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(
        '{"instruction": "a", "output": "b"}\n{"instruction": "\\ud83d", "output": "b"}\n'
    )
    with pytest.raises(DataError, match="line 2, has half of a character"):
        read(path)
    turns = '[{"role": "user", "content": "\\ud83d"}, {"role": "assistant", "content": "b"}]'
    path.write_text(f'{{"messages": {turns}}}')
    with pytest.raises(DataError, match="column 'messages': a message has half of a character"):
        read(path)
