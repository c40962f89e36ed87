"""Files of rows that are damaged, or that nobody could mean: one sentence, whatever they hold."""

import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flexlora.data.corpora import table
from flexlora.data.formats import arrow_files
from flexlora.data.sources import sources_of
from flexlora.errors import DataError
from support import sizes

ROW = '{"instruction": "a", "input": "b", "output": "c"}\n'

UNREADABLE = {
    "lists in lists.jsonl": ROW + '{"instruction": %s}\n' % ("[" * 100_000 + "]" * 100_000),
    "lists first.jsonl": '{"instruction": %s}\n' % ("[" * 100_000 + "]" * 100_000),
    "digits.jsonl": ROW + '{"instruction": "a", "output": %s}\n' % ("9" * 6000),
    "digits.json": "[%s]" % ('{"instruction": "a", "output": %s}' % ("9" * 6000)),
    "lists.json": "[" * 100_000,
    "objects.json": '{"instruction":\n' + "9" * 6000 + "}\n" + ROW,
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_json_that_python_does_not_read_is_refused(tmp_path, name):
    (tmp_path / name).write_text(UNREADABLE[name])
    with pytest.raises(DataError):
        table.read(tmp_path / name)


@sizes.trials(60, 3000)
def test_flipped_bytes_of_a_parquet_file_are_rows_or_a_sentence(tmp_path, trials):
    rows = {name: [f"{name} {number}" for number in range(40)] for name in ("client", "output")}
    rows["instruction"] = rows["output"]
    pq.write_table(pa.table(rows), tmp_path / "good.parquet")
    good, draw = (tmp_path / "good.parquet").read_bytes(), random.Random(3)
    refused = 0
    for trial in range(trials):
        data = bytearray(good)
        for _ in range(draw.choice((1, 3, 10))):
            data[draw.randrange(len(data))] = draw.randrange(256)
        path = tmp_path / f"{trial}.parquet"
        path.write_bytes(data)
        try:
            (source,) = sources_of(path)
            arrow_files.count(source)
            arrow_files.head(source, 5)
            table.read(path)
        except DataError:
            refused += 1
        path.unlink()
    assert 0 < refused < trials
