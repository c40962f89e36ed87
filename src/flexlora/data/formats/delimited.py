"""CSV, TSV and other tables in text."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import IO, Any

import pyarrow as pa
import pyarrow.csv

from flexlora.data.format import Source, first_record, records_of
from flexlora.data.rows import Rows
from flexlora.errors import DataError


def names(source: Source, wanted: Collection[str] = ()) -> list[str]:
    """The header."""
    del wanted
    return first_record(source)


def read(source: Source, columns: Collection[str]) -> Rows:
    """These columns, all text: no value is taken for null.

    Raises:
        DataError: a row has not as many values as the header, or a quote is not closed.
    """
    chosen = list(columns)
    parse = pyarrow.csv.ParseOptions(delimiter=source.delimiter, newlines_in_values=True)
    convert = pyarrow.csv.ConvertOptions(
        include_columns=chosen, column_types=dict.fromkeys(chosen, pa.large_string())
    )
    try:
        with _utf8(source) as stream:
            table = pyarrow.csv.read_csv(stream, parse_options=parse, convert_options=convert)
    except pa.ArrowInvalid as error:
        unknown = f"{source.place} cannot be read as CSV; save it again as UTF-8 CSV."
        raise DataError(_fault(source) or unknown) from error
    # Arrow takes a quote that is never closed for one that ends with the file.
    if _has_odd_quotes(source) and (fault := _fault(source)):
        raise DataError(fault)
    return Rows.of(table, source.place)


@contextmanager
def _utf8(source: Source) -> Iterator[IO[bytes] | Any]:
    """The file's bytes in UTF-8; another encoding is converted in memory."""
    if source.encoding.startswith("utf-8"):
        with source.bytes() as stream:
            yield stream
    else:
        with source.text() as text:
            yield pa.BufferReader(text.read().encode())


def _has_odd_quotes(source: Source) -> bool:
    with source.bytes() as stream:
        chunks = iter(lambda: stream.read(1 << 20), b"")
        return sum(chunk.count(b'"') for chunk in chunks) % 2 == 1


def _fault(source: Source) -> str | None:
    """What is wrong with the table, and in which line, or None; found by reading it again."""
    width, line, last = len(first_record(source)), 0, 0
    csv.field_size_limit(2**31 - 1)
    with source.text() as stream:
        reader = csv.reader(stream, delimiter=source.delimiter, strict=True)
        try:
            for row in reader:
                line, last = last + 1, reader.line_num
                if row and len(row) != width:
                    return _wrong_width(source, len(row), width, line, last)
        except csv.Error:
            return (
                f"{source.place}, line {last + 1}: a quote opens in this row and is not closed as "
                'CSV requires. Close it, and write a quote inside of a quoted value as "".'
            )
    return None


def _wrong_width(source: Source, values: int, width: int, line: int, last: int) -> str:
    name = {",": "comma", "\t": "tab", ";": "semicolon"}.get(source.delimiter, "vertical bar")
    spans = f" (it extends to line {last}; is a quote not closed?)" if last > line else ""
    remedy = (
        f'put values that contain a {name} into double quotes, "..."'
        if values > width
        else "a value is missing (an empty one needs its delimiter too), or a quote is not closed"
    )
    return (
        f"{source.place}, line {line}: the row has {values} values{spans}, but the header has "
        f"{width}; {remedy}."
    )


def head(source: Source, most: int) -> dict[str, list[Any]]:
    """The values of all columns in the first rows."""
    with source.text() as stream:
        header, *rows = itertools.islice(records_of(stream, source), most + 1)
    return {
        name: [row[place] for row in rows if place < len(row)] for place, name in enumerate(header)
    }


def count(source: Source) -> int:
    """The number of rows; the whole text is read."""
    with source.text() as stream:
        return sum(1 for _ in records_of(stream, source)) - 1
