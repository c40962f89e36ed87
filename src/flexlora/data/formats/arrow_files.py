"""Parquet and Arrow files, such as those of Polars, Spark and ``datasets``."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from flexlora.data.format import Source
from flexlora.data.rows import Rows
from flexlora.errors import DataError


def names(source: Source, wanted: Collection[str] = ()) -> list[str]:
    """The names of the columns."""
    del wanted
    return list(schema(source).names)


_UNREADABLE = (pa.ArrowException, OSError, UnicodeDecodeError)
"""What is raised while a damaged file is read."""


def schema(source: Source) -> pa.Schema:
    """The columns and their types.

    Raises:
        DataError: the file is damaged.
    """
    try:
        if source.format == "parquet":
            return pq.read_schema(source.path)
        return _table(source).schema
    except _UNREADABLE as error:
        raise DataError(_damaged(source)) from error


def read(
    source: Source, columns: Collection[str], selected: tuple[str, Collection[str]] | None = None
) -> Rows:
    """These columns; ``selected`` is a column and its values whose rows alone are needed.

    Of a Parquet file sorted by that column only the row groups with these values are read.

    Raises:
        DataError: the file is damaged.
    """
    chosen = list(columns)
    try:
        if source.format == "arrow":
            table = _table(source).select(chosen)
        else:
            rows = None if selected is None else _filter(schema(source), *selected)
            table = pq.read_table(source.path, columns=chosen, filters=rows, partitioning=None)
        table.validate(full=True)  # texts that are not UTF-8 would be found by whoever reads them
    except _UNREADABLE as error:
        raise DataError(_damaged(source)) from error
    return Rows.of(table, source.place)


def count(source: Source) -> int:
    """The number of rows, from the file's metadata.

    Raises:
        DataError: the file is damaged.
    """
    try:
        if source.format == "parquet":
            return int(pq.read_metadata(source.path).num_rows)
        return int(_table(source).num_rows)
    except _UNREADABLE as error:
        raise DataError(_damaged(source)) from error


def _table(source: Source) -> pa.Table:
    """An Arrow file or stream, memory-mapped."""
    with pa.memory_map(str(source.path)) as file:
        is_file = file.read(6) == b"ARROW1"
        file.seek(0)
        return (pa.ipc.open_file if is_file else pa.ipc.open_stream)(file).read_all()


def _filter(schema: pa.Schema, column: str, values: Collection[str]) -> pc.Expression:
    field, kind = pc.field(column), schema.field(column).type
    if pa.types.is_integer(kind):
        numbers = [int(value) for value in values if value.lstrip("-").isdecimal()]
        return field.isin(pa.array(numbers, kind))
    return field.cast(pa.string()).isin(pa.array(sorted(values), pa.string()))


def _damaged(source: Source) -> str:
    return (
        f"{source.place} begins as a {source.format.capitalize()} file, but is damaged or "
        "incomplete; copy or write it again."
    )


def head(source: Source, most: int) -> dict[str, list[Any]]:
    """The values of all columns in the first rows.

    Raises:
        DataError: the file is damaged.
    """
    try:
        if source.format == "arrow":
            return dict(_table(source).slice(0, most).to_pydict())
        with pq.ParquetFile(source.path) as file:
            batch = next(file.iter_batches(most), None)
            names = file.schema_arrow.names
            return {name: [] for name in names} if batch is None else batch.to_pydict()
    except _UNREADABLE as error:
        raise DataError(_damaged(source)) from error
