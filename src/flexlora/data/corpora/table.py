"""A corpus from one file: Parquet, JSON lines, a JSON array, or CSV."""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from flexlora.data.corpus import Corpus
from flexlora.errors import DataError


@dataclass(frozen=True)
class Columns:
    """The source's name of each column of a corpus; None for a column that it does not have.

    Without ``instruction`` or ``input`` these are empty in every row. With ``messages`` the
    rows are conversations, and instruction, input and output are not read. Without ``client``
    the rows must be partitioned afterwards, without ``split`` they must be split.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    instruction: str | None = "instruction"
    input: str | None = "input"
    output: str | None = "output"
    messages: str | None = None
    client: str | None = "client"
    category: str | None = "category"
    split: str | None = "split"

    def __post_init__(self) -> None:
        if self.messages is None and self.output is None:
            raise DataError(
                "Columns need an 'output' (the text to learn) or 'messages', but both are None; "
                "set data.columns.output or data.columns.messages."
            )

    def wanted(self) -> dict[str, str]:
        """The columns to read: from the corpus's name to the source's name."""
        if self.messages is None:
            unread: tuple[str, ...] = ()
        else:
            unread = ("instruction", "input", "output")
        named = asdict(self).items()
        return {name: source for name, source in named if source and name not in unread}

    def sources(self) -> list[str]:
        """The source's columns to read, each once, even if two columns use the same one."""
        return list(dict.fromkeys(self.wanted().values()))


def read(
    path: str | Path, columns: Columns | None = None, clients: Collection[str] | None = None
) -> Corpus:
    """The corpus in a ``.parquet``, ``.jsonl``, ``.json`` (lines or one array) or ``.csv`` file.

    With ``clients`` only their rows are read; from a Parquet file sorted by client only the
    row groups that contain them.

    Raises:
        DataError: the suffix is unknown, a column or a client is missing, or a value is
            null or of the wrong type.
    """
    path, columns = Path(path), columns or Columns()
    readers = {
        ".parquet": _parquet,
        ".jsonl": _json,
        ".json": _json,
        ".csv": _csv,
    }
    if path.suffix not in readers:
        raise DataError(
            f"Cannot tell the format of '{path}' from its suffix '{path.suffix}'; rename it to "
            f"one of {', '.join(readers)}."
        )
    if not path.is_file():
        raise DataError(f"There is no file '{path}' to read a corpus from.")
    if clients is not None and columns.client is None:
        raise DataError(
            f"Cannot select clients of '{path}' without a client column; set data.columns.client "
            "to its name."
        )
    wanted = None if clients is None else {str(client) for client in clients}
    table = readers[path.suffix](path, columns, wanted)
    place = f"'{path}'" if wanted is None else f"'{path}' (rows of {len(wanted)} clients)"
    corpus = corpus_of(table, columns, place)
    missing = (wanted or set()) - set(corpus.keys("client") if wanted else ())
    if missing:
        raise DataError(
            f"'{path}' has no rows of {len(missing)} of the selected clients, such as "
            f"'{min(missing)}'; the client names are in its column '{columns.client}'."
        )
    return corpus


def column_names(path: str | Path) -> list[str]:
    """The names of a file's columns; for JSON those of the first record.

    Raises:
        DataError: the suffix is unknown, or there is no such file or no record in it.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"There is no file '{path}' to read a corpus from.")
    if path.suffix == ".parquet":
        return list(pq.read_schema(path).names)
    if path.suffix == ".csv":
        with pyarrow.csv.open_csv(path) as head:
            return list(head.schema.names)
    if path.suffix not in (".json", ".jsonl"):
        raise DataError(
            f"Cannot tell the format of '{path}' from its suffix '{path.suffix}'; rename it to "
            "one of .parquet, .jsonl, .json, .csv."
        )
    _, record = next(_records(path), (0, None))
    if not isinstance(record, dict):
        raise DataError(f"'{path}' has no records; each must be a JSON object of named columns.")
    return list(record)


def corpus_of(table: pa.Table, columns: Columns, place: str) -> Corpus:
    """The corpus in an Arrow table whose columns have the names given by ``columns``.

    Raises:
        DataError: a column is missing, or a value is null or of the wrong type.
    """
    check_names(columns, table.column_names, place)
    texts: dict[str, pa.ChunkedArray | Sequence[str]] = {}
    for name, source in columns.wanted().items():
        texts[name] = _text(name, source, table[source], place)
    if columns.messages is None:
        for name in ("instruction", "input"):
            if name not in texts:
                texts[name] = pa.chunked_array([pa.repeat("", table.num_rows)])
    return Corpus.build(texts, place)


def check_names(columns: Columns, names: Sequence[str], place: str) -> None:
    """Check that a source has all columns.

    Raises:
        DataError: a column is missing; names it, the existing columns, and the nearest name.
    """
    for name, source in columns.wanted().items():
        if source not in names:
            near = difflib.get_close_matches(source, names, n=1)
            guess = f"Did you mean '{near[0]}'? " if near else ""
            raise DataError(
                f"{place} has no column '{source}' for the {name}; its columns are "
                f"{', '.join(names)}. {guess}Set data.columns.{name} to the right name, or to "
                '"" if there is no such column.'
            )


def _text(name: str, source: str, column: pa.ChunkedArray, place: str) -> Any:
    """The column as text; clients and categories may be integers, messages may be nested."""
    value = column.type
    if pa.types.is_dictionary(value):
        value = value.value_type
    if pa.types.is_string(value) or pa.types.is_large_string(value):
        return column
    if name in ("client", "category") and pa.types.is_integer(value):
        return column.cast(value).cast(pa.string())
    if name == "messages" and (pa.types.is_list(value) or pa.types.is_large_list(value)):
        return [None if row is None else _messages(row) for row in column.to_pylist()]
    if pa.types.is_null(value):
        return column.cast(pa.string())
    raise DataError(
        f"Column '{source}' of {place} has the type {value}, but the {name} must be text; its "
        f"first row is {column[0].as_py() if len(column) else None!r}. Convert it in the source."
    )


def _messages(row: Sequence[Any]) -> str:
    """A conversation as JSON, without keys whose value is null."""
    messages = [
        {key: value for key, value in message.items() if value is not None}
        if isinstance(message, Mapping)
        else message
        for message in row
    ]
    return json.dumps(messages, ensure_ascii=False)


def _parquet(path: Path, columns: Columns, clients: set[str] | None) -> pa.Table:
    schema = pq.read_schema(path)
    check_names(columns, schema.names, f"'{path}'")
    chosen = None
    if clients is not None:
        field = pc.field(columns.client)
        if pa.types.is_integer(schema.field(columns.client).type):
            numbers = [int(client) for client in clients if client.lstrip("-").isdecimal()]
            chosen = field.isin(pa.array(numbers, schema.field(columns.client).type))
        else:
            chosen = field.cast(pa.string()).isin(pa.array(sorted(clients), pa.string()))
    return pq.read_table(path, columns=columns.sources(), filters=chosen)


def _csv(path: Path, columns: Columns, clients: set[str] | None) -> pa.Table:
    parse = pyarrow.csv.ParseOptions(newlines_in_values=True)
    with pyarrow.csv.open_csv(path, parse_options=parse) as head:
        check_names(columns, head.schema.names, f"'{path}'")
    names = columns.sources()
    convert = pyarrow.csv.ConvertOptions(
        include_columns=names, column_types=dict.fromkeys(names, pa.large_string())
    )
    table = pyarrow.csv.read_csv(path, parse_options=parse, convert_options=convert)
    if clients is None:
        return table
    return table.filter(pc.is_in(table[columns.client], pa.array(sorted(clients))))


def _json(path: Path, columns: Columns, clients: set[str] | None) -> pa.Table:
    wanted = columns.wanted()
    texts_by_source: dict[str, list[str]] = {source: [] for source in wanted.values()}
    for row, record in _records(path):
        place = f"'{path}', row {row},"
        if not isinstance(record, dict):
            raise DataError(
                f"{place} is {record!r:.60}; it must be a JSON object of named columns."
            )
        if clients is not None and str(record.get(columns.client)) not in clients:
            continue
        check_names(columns, list(record), place)
        row_texts = {s: _json_text(n, s, record[s], place) for n, s in wanted.items()}
        for source, text in row_texts.items():
            texts_by_source[source].append(text)
    return pa.table({s: pa.array(texts, pa.large_string()) for s, texts in texts_by_source.items()})


def _json_text(name: str, source: str, value: Any, place: str) -> str:
    if isinstance(value, str):
        return value
    if name in ("client", "category") and type(value) is int:
        return str(value)
    if name == "messages" and isinstance(value, list):
        return _messages(value)
    got = "null" if value is None else f"{value!r:.60}, a {type(value).__name__}"
    raise DataError(
        f"{place} has {got} in the column '{source}', but the {name} must be text; correct it "
        "in the source."
    )


def _records(path: Path) -> Iterator[tuple[int, Any]]:
    """The records with their numbers from 1: the lines of JSON Lines or the items of an array."""
    with path.open(encoding="utf-8") as file:
        start = file.read(256).lstrip()[:1]
        file.seek(0)
        if path.suffix == ".json" and start == "[":
            yield from enumerate(_parsed(file.read(), f"'{path}'"), 1)
            return
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, _parsed(line, f"Line {number} of '{path}'")


def _parsed(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{place} is not JSON: {error}; correct it in the source.") from error
