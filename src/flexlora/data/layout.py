"""What a file of rows contains, for those who write a config for it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

from flexlora.data.columns import OTHER_NAMES, Columns, choose
from flexlora.data.format import Source
from flexlora.data.sources import sources_of
from flexlora.errors import DataError

_LOOKED_AT: Final = 1000
_EXCERPT: Final = 60


@dataclass(frozen=True)
class Layout:
    """What a file, or the files of a folder, contain.

    ``format`` is parquet, arrow, json or csv; ``types`` and ``examples`` belong to the columns, an
    example being the beginning of the first value that is not empty. ``mapping`` names every
    column that would be read, and those that may be the client and the category; ``fault`` is the
    sentence that says why the rows cannot be read with it, or None.
    """

    path: Path
    files: int
    format: str
    compression: str | None
    encoding: str
    delimiter: str
    columns: tuple[str, ...]
    types: tuple[str, ...]
    examples: tuple[str, ...]
    rows: int
    mapping: Columns
    notices: tuple[str, ...]
    fault: str | None


def inspect_table(path: str | Path, encoding: str | None = None) -> Layout:
    """The layout of a file of rows, or of the files that a folder or a pattern stands for.

    Cost: text is read twice; of Parquet only the metadata and a thousand rows are.

    Raises:
        DataError: there is no such file, or it cannot be read.
    """
    from flexlora.data.formats import arrow_files, delimited, records

    files = sources_of(path, encoding)
    readers: dict[str, Any] = {
        "parquet": arrow_files,
        "arrow": arrow_files,
        "json": records,
        "csv": delimited,
    }
    first = files[0]
    names = [*dict.fromkeys([*readers[first.format].names(first), *first.constants])]
    values = {**readers[first.format].head(first, _LOOKED_AT)}
    values |= {name: [value] for name, value in first.constants.items()}
    mapping, notices, fault = _mapping(names, first)
    return Layout(
        path=Path(path),
        files=len(files),
        format=first.format,
        compression=first.compression,
        encoding=first.encoding,
        delimiter=first.delimiter,
        columns=tuple(names),
        types=tuple(_type(values[name]) for name in names),
        examples=tuple(_example(values[name]) for name in names),
        rows=sum(readers[source.format].count(source) for source in files),
        mapping=mapping,
        notices=(*(notice for source in files for notice in source.notices), *notices),
        fault=fault,
    )


def _mapping(names: Sequence[str], source: Source) -> tuple[Columns, tuple[str, ...], str | None]:
    """The columns that would be read, notices on them, and why they cannot be, or None."""
    try:
        chosen = choose(Columns(), names, source.place)
    except DataError as error:
        return Columns(), (), str(error)
    columns = dict(chosen.sources)
    for column in ("client", "category"):
        likely = [name for name in names if name.strip().casefold() in OTHER_NAMES[column]]
        if column not in columns and len(likely) == 1:
            columns[column] = likely[0]
    known = {field.name for field in fields(Columns)}
    return Columns(**{n: c for n, c in columns.items() if n in known}), chosen.notices, None


def _type(values: Sequence[Any]) -> str:
    """The kinds of a column's values, such as ``text`` or ``number or null``."""
    kinds = dict.fromkeys(_kind(value) for value in values)
    return " or ".join(sorted(kinds, key=lambda kind: kind == "null")) or "none"


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, str | bytes):
        return "text"
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int | float):
        return "number"
    if isinstance(value, dict):
        return "object"
    return "list" if isinstance(value, Sequence) else "date or time"


def _example(values: Sequence[Any]) -> str:
    value = next((each for each in values if each not in (None, "")), "")
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    line = " ".join(text.split())
    return line if len(line) <= _EXCERPT else line[: _EXCERPT - 1] + "…"
