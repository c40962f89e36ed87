"""A corpus from rows in memory: dicts, and tables of pandas, Polars, Arrow and datasets."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import pyarrow as pa

from flexlora.data.columns import Columns, choose
from flexlora.data.corpora.table import corpus_of, of_splits, of_table
from flexlora.data.corpus import Corpus
from flexlora.data.formats import records
from flexlora.errors import DataError

_PLACE = "The rows"


def read(
    rows: Any,
    columns: Columns | None = None,
    *,
    needs: Collection[str] = (),
    fields: Collection[str] = (),
) -> Corpus:
    """The corpus of rows in memory.

    ``rows`` is a list (or any iterable) of dicts, a dict of columns, a ``Dataset`` or
    ``DatasetDict`` of datasets, also a streamed one, or a table that can be exported to Arrow: of
    pandas, Polars or PyArrow. None of these packages is imported here. ``needs`` and ``fields``
    are as of ``table.read``.

    Raises:
        DataError: the object is none of these, a column is missing, or a value cannot be used.
    """
    columns = columns or Columns()
    if isinstance(rows, Corpus):
        return rows
    if isinstance(rows, Mapping) and rows and all(map(_is_dataset, rows.values())):
        splits = [(str(split), exported(part)) for split, part in rows.items()]
        return of_splits(splits, columns, _PLACE)
    if isinstance(rows, Mapping):
        rows = _of_columns(rows)
    elif (table := _table(rows)) is not None:
        corpus = of_table(table, columns, _PLACE, needs, fields)
        return _not_empty(corpus)
    elif hasattr(rows, "to_dict") and hasattr(rows, "columns"):
        rows = rows.to_dict("records")  # a pandas frame with values of mixed types
    if isinstance(rows, str | bytes) or not isinstance(rows, Iterable):
        raise DataError(
            f"{_PLACE} are a {type(rows).__name__}; give a list of dicts, a table of pandas, "
            "Polars, PyArrow or datasets, or a flexlora.Corpus."
        )
    return _not_empty(_of_records(list(rows), columns, needs, fields))


def _of_records(
    rows: list[Any], columns: Columns, needs: Collection[str], fields: Collection[str]
) -> Corpus:
    names = list(dict.fromkeys(name for row in rows if isinstance(row, Mapping) for name in row))
    if not all(isinstance(name, str) for name in names):
        raise DataError(f"{_PLACE} have columns that are not named by text: {names!r:.80}.")
    numbered = enumerate(rows, 1)
    if not names:
        kind = type(rows[0]).__name__ if rows else "nothing"
        raise DataError(f"{_PLACE} are {kind} and not dicts with columns, or there are none.")
    chosen = choose(columns, names, _PLACE, needs, fields)
    read = records.rows(numbered, chosen.names(), lambda number: f"{_PLACE}, row {number},")
    return corpus_of(read, chosen, _PLACE).noting(chosen.notices)


def _of_columns(columns: Mapping[Any, Any]) -> list[dict[Any, Any]]:
    """The rows of a dict of columns, which may be lists or arrays.

    Raises:
        DataError: they differ in length.
    """
    values = {name: list(column) for name, column in columns.items()}
    lengths = {name: len(column) for name, column in values.items()}
    if len(set(lengths.values())) > 1:
        raise DataError(f"{_PLACE} have columns of different lengths: {lengths}.")
    return [dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True)]


def _is_dataset(rows: Any) -> bool:
    """Whether this is a ``datasets.Dataset`` or ``IterableDataset``."""
    return hasattr(rows, "with_format") and hasattr(rows, "column_names")


def exported(rows: Any) -> pa.Table:
    """The rows of a ``datasets.Dataset`` or ``IterableDataset``, in the dataset's order."""
    if not hasattr(rows, "__len__"):  # it is streamed
        return pa.Table.from_pylist(list(rows))
    table: pa.Table = rows.with_format("arrow")[:]
    return table


def _table(rows: Any) -> pa.Table | None:
    """The rows as an Arrow table; None if they cannot be exported as one."""
    if isinstance(rows, pa.Table):
        return rows
    if _is_dataset(rows):
        return exported(rows)
    if hasattr(rows, "collect") and hasattr(rows, "collect_schema"):
        rows = rows.collect()  # a lazy frame of Polars
    if not hasattr(rows, "__arrow_c_stream__"):
        return None
    try:
        return pa.table(rows)
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return None


def _not_empty(corpus: Corpus) -> Corpus:
    if not len(corpus):
        raise DataError(f"{_PLACE} are none; give at least one that can be learnt.")
    return corpus
