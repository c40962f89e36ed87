"""Files as people have them: encodings, compressions, delimiters, folders, and what is no table."""

import bz2
import gzip
import json
import lzma
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flexlora.data import Columns, inspect_table
from flexlora.data.corpora.table import read
from flexlora.errors import DataError

ROWS = [
    {"client": f"c{row % 2}", "instruction": "Grüße", "input": "", "output": f"für {row}"}
    for row in range(5)
]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
CSV = "client,instruction,input,output\n" + "".join(",".join(r.values()) + "\n" for r in ROWS)
PLAIN = [(f"Grüße für {row}", f"c{row % 2}") for row in range(5)]


def write(folder, content, name="rows.txt"):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def content(corpus):
    texts = [f"{e.instruction} {e.output}" for e in corpus.examples(range(len(corpus)))]
    return list(zip(texts, corpus.keys("client").tolist(), strict=True))


@pytest.mark.parametrize("text", [LINES, CSV, json.dumps(ROWS), json.dumps(ROWS, indent=1)])
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "cp1252"])
def test_encodings_are_recognized_and_said(tmp_path, text, encoding):
    corpus = read(write(tmp_path, text.encode(encoding, "xmlcharrefreplace")))
    if "\\u" not in text:
        assert content(corpus) == PLAIN
    if encoding == "utf-8-sig" or (encoding == "cp1252" and text.isascii()):
        assert corpus.notices == ()
    else:
        (notice,) = corpus.notices
        assert encoding.upper()[:6] in notice.upper()


def test_an_encoding_may_be_named(tmp_path):
    path = write(tmp_path, LINES.replace("ü", "ß").encode("cp850"))
    assert read(path, encoding="cp850").example(0).output == "fßr 0"
    with pytest.raises(DataError, match=r"no encoding 'utf9'.*set data.encoding"):
        read(path, encoding="utf9")
    with pytest.raises(DataError, match=r"not text of the encoding 'utf-8' \(byte 0xe1, line 1\)"):
        read(path, encoding="utf-8")


@pytest.mark.parametrize("text", ["это русский текст здесь", "中文文本在这里"])
def test_text_of_an_unknown_encoding_is_refused(tmp_path, text):
    line = json.dumps({"instruction": text, "output": text}, ensure_ascii=False)
    encoding = "cp1251" if text[0] == "э" else "gbk"
    path = write(tmp_path, line.encode(encoding))
    with pytest.raises(DataError, match=r"not UTF-8 throughout.*set data.encoding"):
        read(path)
    assert read(path, encoding=encoding).example(0).output == text


def test_a_single_wrong_byte_in_utf8_is_named_with_its_line(tmp_path):
    path = write(tmp_path, LINES.encode().replace("für 3".encode(), b"f\xffr 3"))
    with pytest.raises(DataError, match="byte 0xff, line 4"):
        read(path)


@pytest.mark.parametrize(
    "compress",
    [
        gzip.compress,
        bz2.compress,
        lzma.compress,
        lambda text: pa.compress(text, "zstd", asbytes=True),
    ],
)
def test_compressed_files_are_read_whatever_their_name(tmp_path, compress):
    for text in (LINES, CSV):
        data = compress(text.encode())
        if data[:4] == b"\x28\xb5\x2f\xfd":
            with pa.CompressedOutputStream(str(tmp_path / "rows.txt"), "zstd") as file:
                file.write(text.encode())
            path = tmp_path / "rows.txt"
        else:
            path = write(tmp_path, data)
        assert content(read(path)) == PLAIN


def test_a_damaged_compressed_file_is_refused(tmp_path):
    data = gzip.compress(LINES.encode())
    for broken in (data[: len(data) // 2], data[:20] + b"\xff\xff\xff" + data[23:]):
        with pytest.raises(DataError, match="cannot be read: its compressed data are damaged"):
            read(write(tmp_path, broken, "rows.jsonl.gz"))


@pytest.mark.parametrize("delimiter", ["\t", ";", "|"])
def test_delimiters_are_recognized(tmp_path, delimiter):
    corpus = read(write(tmp_path, CSV.replace(",", delimiter), "rows.csv"))
    assert content(corpus) == PLAIN and len(corpus.notices) == 1
    assert read(write(tmp_path, CSV.replace(",", "\t"), "rows.tsv")).notices == ()


def test_json_is_recognized_by_its_content(tmp_path):
    for text in (json.dumps(ROWS), json.dumps(ROWS, indent=2), LINES, json.dumps({"data": ROWS})):
        assert content(read(write(tmp_path, text, "rows.jsonl"))) == PLAIN
    spread = "\n".join(json.dumps(row, indent=2) for row in ROWS)
    assert content(read(write(tmp_path, spread, "rows.jsonl"))) == PLAIN
    one = json.dumps(
        {
            "messages": [{"role": "user", "content": "a"}] * 2
            + [{"role": "assistant", "content": "b"}]
        }
    )
    assert read(write(tmp_path, one)).example(0).output == "b"
    lists = json.dumps([[{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]])
    assert read(write(tmp_path, lists)).example(0).output == "b"
    frame = {"instruction": {"0": "a"}, "output": {"0": "b"}}
    with pytest.raises(DataError, match="orient='records', lines=True"):
        read(write(tmp_path, json.dumps(frame)))


def test_a_parquet_file_with_another_suffix_is_read(tmp_path):
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "rows.csv")
    assert content(read(tmp_path / "rows.csv")) == PLAIN


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"\n\n", "is empty"),
        (b"client,instruction,output\n", "has no rows"),
        (b"PK\x03\x04rest", "Excel workbook; unpack it"),
        (b"\x80\x04\x95rest", "pickle, which is never opened"),
        (b"SQLite format 3\x00", "SQLite"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"PAR1 and nothing more", "begins as a Parquet file, but is damaged"),
        (b"Just some words.\nAnd more.\n", "neither JSON nor a table"),
        (random.Random(1).randbytes(4000), "neither text nor"),
    ],
)
def test_what_is_no_table_is_refused_by_name(tmp_path, data, message):
    with pytest.raises(DataError, match=message) as refusal:
        read(write(tmp_path, data))
    assert "\n" not in str(refusal.value) and str(tmp_path) in str(refusal.value)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("c1,a,,b,c", "line 7: the row has 5 values, but the header has 4; put values that"),
        ("c1,a", "line 7: the row has 2 values, but the header has 4; a value is missing"),
        ('c1,a,,"b', "line 7: a quote opens in this row and is not closed"),
        ('c1,a,,"b\nc0,x,,y', "line 7: a quote opens in this row and is not closed"),
        ('"c1,a\nx",y,,"b"\n"c\n', "line 9: a quote opens"),
    ],
)
def test_a_faulty_row_of_a_csv_file_is_named_by_its_line(tmp_path, row, message):
    path = write(tmp_path, CSV + row, "rows.csv")
    with pytest.raises(DataError, match=message) as refusal:
        read(path)
    assert "rows.csv'" in str(refusal.value)


def test_folders_of_shards_are_read(tmp_path):
    for number in (0, 1):
        part = pa.Table.from_pylist(ROWS[number * 3 : number * 3 + 3])
        write(tmp_path / "a", b"", f"part-{number}")
        pq.write_table(part, tmp_path / "a" / f"part-{number}.parquet")
    write(tmp_path / "a", b"", "_SUCCESS")
    assert content(read(tmp_path / "a")) == PLAIN
    assert content(read(tmp_path / "a" / "part-*.parquet")) == PLAIN
    with pytest.raises(DataError, match=r"No file matches .*\*\.csv"):
        read(tmp_path / "a" / "*.csv")
    write(tmp_path / "b", b"x", "README.md")
    with pytest.raises(DataError, match=r"has no file of rows \(it contains README.md\)"):
        read(tmp_path / "b")


def test_the_names_of_files_may_be_splits(tmp_path):
    for name in ("train-00000.jsonl", "validation.jsonl", "test.jsonl"):
        write(tmp_path, LINES, name)
    corpus = read(tmp_path)
    assert sorted(set(corpus.keys("split"))) == ["test", "train", "validation"]
    assert "the names of the files" in corpus.notices[0]
    assert "split" not in read(tmp_path, Columns(split="")).columns


def test_folders_may_be_values_of_a_column(tmp_path):
    for client in ("ada", "bo"):
        write(tmp_path, LINES.replace('"client"', '"who"'), f"client={client}/part-0.jsonl")
    corpus = read(tmp_path)
    assert corpus.keys("client").tolist() == ["ada"] * 5 + ["bo"] * 5


def saved(folder, rows):
    """As ``datasets.Dataset.save_to_disk`` writes."""
    table = pa.Table.from_pylist(rows)
    folder.mkdir(parents=True)
    with pa.ipc.new_stream(folder / "data-00000-of-00001.arrow", table.schema) as file:
        file.write_table(table)
    files = [{"filename": "data-00000-of-00001.arrow"}]
    (folder / "state.json").write_text(json.dumps({"_data_files": files}))


def test_saved_datasets_are_read(tmp_path):
    saved(tmp_path / "one", ROWS)
    assert content(read(tmp_path / "one")) == PLAIN
    for split in ("train", "test"):
        saved(tmp_path / "two" / split, ROWS)
    (tmp_path / "two" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert read(tmp_path / "two").keys("split").tolist() == ["train"] * 5 + ["test"] * 5
    state = tmp_path / "one" / "state.json"
    state.write_text('{"_data_files": [{"filename": "../two/train/data-00000-of-00001.arrow"}]}')
    with pytest.raises(DataError, match="names a file outside"):
        read(tmp_path / "one")


def test_rows_of_conversations_that_are_not_learnt_are_counted(tmp_path):
    user, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    rows = [[user, answer], [user], [user, answer, user], [user, answer, user, answer]]
    lines = [{"client": f"c{i}", "messages": row} for i, row in enumerate(rows)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    corpus = read(write(tmp_path, text))
    assert corpus.keys("client").tolist() == ["c0", "c2", "c3"]
    dropped, cut, several = corpus.notices
    assert dropped.startswith("1 of 4 conversations") and "left out" in dropped
    assert "continue after the last answer" in cut and "only the last one is learnt" in several
    bad = text + json.dumps(
        {"client": "c", "messages": [{**user, "content": [{"type": "image"}]}, answer]}
    )
    with pytest.raises(DataError, match=r"line 5, column 'messages': a message has a part"):
        read(write(tmp_path, bad))


def test_a_layout_says_what_a_file_contains(tmp_path):
    text = CSV.replace("client", "hospital").replace("instruction", "question")
    layout = inspect_table(write(tmp_path, text.replace(",", ";").encode("cp1252")))
    assert (layout.format, layout.delimiter, layout.encoding, layout.rows) == (
        "csv",
        ";",
        "cp1252",
        5,
    )
    assert layout.columns == ("hospital", "question", "input", "output")
    assert layout.examples == ("c0", "Grüße", "", "für 0")
    assert layout.mapping == Columns(input="input", output="output", client="hospital")
    assert layout.fault is None and layout.files == 1
    nested = inspect_table(write(tmp_path, '{"a": null, "b": [1]}\n{"a": 2.5}\n'))
    assert nested.types == ("number or null", "list or null")
    assert nested.mapping == Columns() and "no column for the prompt" in nested.fault
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    assert inspect_table(str(tmp_path / "rows.parquet")).rows == 5


def test_a_row_without_a_client_is_refused_and_one_without_a_category_is_not(tmp_path):
    rows = "client,category,instruction,output\nc1,,a,b\n,x,a,b\n"
    with pytest.raises(DataError, match=r"row 2, has no client: .* is null or empty there"):
        read(write(tmp_path, rows))
    corpus = read(write(tmp_path, rows), Columns(client=""))
    assert corpus.keys("category").tolist() == ["none", "x"]


def test_a_long_value_and_an_open_quote_in_the_header_are_no_crash(tmp_path):
    long = "x" * 200_000
    path = write(tmp_path, f"instruction,output\na,{long}\n")
    assert len(read(path).example(0).output) == 200_000 and inspect_table(path).rows == 1
    with pytest.raises(DataError):
        read(write(tmp_path, f'instruction,"output\na,{long}\n'))


def test_an_address_is_no_path():
    with pytest.raises(DataError, match=r"is an address \('https:/x.org/a.csv'\); download"):
        read("https://x.org/a.csv")


def test_quotes_inside_of_values_are_kept(tmp_path):
    rows = CSV + 'c1,a,5" pipe,b\nc1,"a ""b"", c\nd",,e\n'
    corpus = read(write(tmp_path, rows, "rows.csv"))
    assert corpus.example(5).input == '5" pipe'
    assert corpus.example(6).instruction == 'a "b", c\nd'
