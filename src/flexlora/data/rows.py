"""Columns as a source has them, and their values as text."""

from __future__ import annotations

import datetime
import decimal
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.compute as pc

from flexlora.errors import DataError

Raw: TypeAlias = pa.ChunkedArray | list[Any]
"""A column as it was read: an Arrow array, or values of JSON or Python."""

NO_CATEGORY = "none"
"""The category of a row whose category is null."""


class WrittenFloat(float):
    """A float of a JSON file, with its text as it was written."""

    text: str

    def __new__(cls, text: str) -> WrittenFloat:
        """The float of this text."""
        number = super().__new__(cls, text)
        number.text = text
        return number


@dataclass(frozen=True)
class Rows:
    """Some columns of a source by their names there; ``place`` says where row i is."""

    columns: Mapping[str, Raw]
    length: int
    place: Callable[[int], str]

    @classmethod
    def of(cls, table: pa.Table, place: str) -> Rows:
        """The rows of an Arrow table, which ``place`` describes."""
        columns = {name: table[name] for name in table.column_names}
        return cls(columns, table.num_rows, lambda row: f"{place}, row {row + 1},")


def texts(name: str, source: str, rows: Rows) -> pa.ChunkedArray:
    """The column ``source`` of the rows as text, for the corpus's column ``name``.

    Null instructions and inputs are empty, a null category is ``NO_CATEGORY``. Numbers are
    written as in the source (of a binary float the shortest text that gives it), Booleans as
    true and false, dates and times in ISO 8601. Whole clients and categories have no decimals.

    Raises:
        DataError: another value is null, or a value is a list or an object.
    """
    column = rows.columns[source]
    if isinstance(column, list):
        array = pa.chunked_array([_utf8(_of_values(name, source, rows), source, rows)])
    else:
        array = _of_array(name, source, rows, column)
    if name in ("client", "category", "split"):
        array = _without_empty(array)
    if not array.null_count:
        return array
    if name in ("instruction", "input"):
        return pc.fill_null(array, "")
    if name == "category":
        return pc.fill_null(array, NO_CATEGORY)
    row = pc.index(array.is_null(), pa.scalar(True)).as_py()
    others = f" and in {array.null_count - 1} more rows" if array.null_count > 1 else ""
    nothing = "null or empty" if name in ("client", "split") else "null"
    remedy = f"fill in the {name}, or remove such rows"
    if name == "split":
        remedy += ', or set data.columns.split = "" to draw new splits'
    raise DataError(
        f"{rows.place(row)} has no {name}: the column '{source}' is {nothing} there{others}; "
        f"{remedy}."
    )


def _without_empty(array: pa.ChunkedArray) -> pa.ChunkedArray:
    """The column with null for empty texts, which is how CSV writes null."""
    if "" not in pc.unique(array).to_pylist():
        return array
    plain = array.cast(pa.large_string())
    return pc.if_else(pc.equal(plain, ""), pa.scalar(None, pa.large_string()), plain)


def _of_array(name: str, source: str, rows: Rows, column: pa.ChunkedArray) -> pa.ChunkedArray:
    kind = column.type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
        if _is_text(kind):
            return column if kind in (pa.string(), pa.large_string()) else column.cast(kind)
        column = column.cast(kind)
    if _is_text(kind):
        return column.cast(pa.large_string())
    if pa.types.is_null(kind) or pa.types.is_boolean(kind) or _is_number(kind):
        return column.cast(pa.large_string())
    if pa.types.is_temporal(kind):
        return column.cast(pa.large_string())
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        try:
            return column.cast(pa.large_string())
        except pa.ArrowInvalid as error:
            raise DataError(
                f"The column '{source}' of {rows.place(0)} has bytes that are not UTF-8 text, but "
                f"the {name} must be text; convert it in the source."
            ) from error
    example: Any = next((value for value in column.to_pylist() if value is not None), None)
    raise DataError(_not_text(name, source, rows.place(0), example))


def _is_text(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_string(kind) or pa.types.is_large_string(kind) or kind == pa.string_view()
    )


def _is_number(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)
    )


def _of_values(name: str, source: str, rows: Rows) -> list[str | None]:
    values: list[str | None] = []
    for row, value in enumerate(rows.columns[source]):
        try:
            values.append(value if type(value) is str else _scalar(value, name))
        except TypeError:
            raise DataError(_not_text(name, source, rows.place(row), value)) from None
    return values


def _utf8(values: list[str | None], source: str, rows: Rows) -> pa.Array:
    """The texts as an Arrow array.

    Raises:
        DataError: one is not text that can be written, as JSON's escapes can make.
    """
    try:
        return pa.array(values, pa.large_string())
    except UnicodeEncodeError:
        row = next(row for row, value in enumerate(values) if value and not is_text(value))
        raise DataError(
            f"{rows.place(row)} has half of a character (a lone surrogate such as \\ud83d) in the "
            f"column '{source}'; correct the text, or remove the row."
        ) from None


def is_text(value: str) -> bool:
    """Whether the string can be written as UTF-8."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _scalar(value: Any, name: str) -> str | None:
    """A value as text; None for null and for a number that is not one.

    Raises:
        TypeError: it is a list, an object, or something else.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, str):
        return str(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        if name in ("client", "category") and value.is_integer():
            return str(int(value))
        return value.text if isinstance(value, WrittenFloat) else repr(float(value))
    if isinstance(value, int | decimal.Decimal):
        return str(value)
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if hasattr(value, "item") and not hasattr(value, "__len__"):  # a NumPy scalar
        return _scalar(value.item(), name)
    raise TypeError


def _not_text(name: str, source: str, place: str, value: Any) -> str:
    kind = "a list" if isinstance(value, Sequence) else "an object"
    shown = json.dumps(value, ensure_ascii=False, default=str)
    return (
        f"{place} has {shown[:60]} in the column '{source}', but the {name} must be text and not "
        f"{kind}; convert it in the source, or read another column: data.columns.{name}."
    )
