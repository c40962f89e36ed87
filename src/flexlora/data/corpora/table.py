"""A corpus from files of rows: Parquet, Arrow, JSON, CSV and their relatives."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from flexlora.data.columns import Chosen, Columns, choose
from flexlora.data.conversation import Fault, parse
from flexlora.data.corpus import Corpus, Encoded, concatenated
from flexlora.data.format import Source
from flexlora.data.formats import arrow_files, delimited, records
from flexlora.data.rows import Rows, is_text, texts
from flexlora.data.sources import SPLIT_NAMES, sources_of, split_name
from flexlora.errors import DataError

_READERS = {"parquet": arrow_files, "arrow": arrow_files, "json": records, "csv": delimited}


def read(
    path: str | Path,
    columns: Columns | None = None,
    clients: Collection[str] | None = None,
    *,
    encoding: str | None = None,
    needs: Collection[str] = (),
    fields: Collection[str] = (),
) -> Corpus:
    """The corpus in a file, in the files of a folder, or in those that match a pattern.

    The content and not the suffix says what a file is; see ``flexlora.data.format``. ``needs``
    are optional columns that must be there, ``fields`` further ones for a prompt template. With
    ``clients`` only their rows are read; from a Parquet file sorted by client only the row
    groups that contain them.

    Raises:
        DataError: there is no such file, it cannot be read, a column or a client is missing,
            or a value cannot be used.
    """
    files = sources_of(path, encoding)
    return read_sources(files, columns, clients, place=f"'{path}'", needs=needs, fields=fields)


def read_sources(
    files: Sequence[Source],
    columns: Columns | None = None,
    clients: Collection[str] | None = None,
    *,
    place: str,
    needs: Collection[str] = (),
    fields: Collection[str] = (),
) -> Corpus:
    """As ``read``, of files that are recognized already; ``place`` is what they are together."""
    columns = columns or Columns()
    chosen = choose(columns, _names(files, columns, fields), place, needs, fields)
    wanted = None if clients is None else {str(client) for client in clients}
    if wanted is not None and "client" not in chosen.sources:
        raise DataError(
            f"Cannot select clients of {place} without a client column; set data.columns.client "
            "to its name."
        )
    parts = [corpus_of(_rows(source, chosen, wanted), chosen, source.place) for source in files]
    notices = [*chosen.notices, *(notice for source in files for notice in source.notices)]
    corpus = concatenated(parts, notices)
    if wanted is not None:
        corpus = _of_clients(corpus, wanted, place, chosen.sources["client"])
    if not len(corpus):
        raise DataError(f"{place} has no rows that can be learnt; it needs at least one.")
    return corpus


def of_table(
    table: pa.Table,
    columns: Columns,
    place: str,
    needs: Collection[str] = (),
    fields: Collection[str] = (),
) -> Corpus:
    """The corpus in an Arrow table, which ``place`` describes in errors.

    Raises:
        DataError: a column is missing, or a value cannot be used.
    """
    chosen = choose(columns, table.column_names, place, needs, fields)
    corpus = corpus_of(Rows.of(table.select(chosen.names()), place), chosen, place)
    return corpus.noting(chosen.notices)


def of_splits(tables: Sequence[tuple[str, pa.Table]], columns: Columns, place: str) -> Corpus:
    """The corpus of tables that are the splits of one dataset, each with its split's name.

    Several splits become the column ``split``, unless ``columns.split`` names another one.

    Raises:
        DataError: there is no table, a split has an unusual name, a column is missing, or a
            value cannot be used.
    """
    if not tables:
        raise DataError(f"{place} has no splits, and so no rows.")
    parts = []
    for name, table in tables:
        if len(tables) > 1 and columns.split is None:
            split = split_name(name, place)
            others = [column for column in table.column_names if column != "split"]
            table = table.select(others).append_column("split", pa.repeat(split, len(table)))
        parts.append(of_table(table, columns, f"{place}, split '{name}'"))
    return concatenated(parts)


def corpus_of(rows: Rows, chosen: Chosen, place: str) -> Corpus:
    """The corpus of rows whose columns are chosen.

    Raises:
        DataError: a value cannot be used.
    """
    encoded: dict[str, Encoded] = {}
    notices: list[str] = []
    for name, source in chosen.sources.items():
        if name != "messages":
            encoded[name] = texts(name, source, rows)
    if "split" in encoded:
        encoded["split"] = _splits(encoded["split"])
    if "messages" in chosen.sources:
        kept, conversations, notices = _conversations(rows, chosen, place)
        encoded = {name: column.take(kept) for name, column in encoded.items()}
        encoded["messages"] = pa.array(conversations, pa.large_string())
    else:
        for name in ("instruction", "input"):
            if name not in encoded:
                encoded[name] = pa.chunked_array([pa.repeat("", rows.length)])
        if chosen.fields:
            encoded["fields"] = _fields(chosen.fields, rows)
    return Corpus.build(encoded, place).noting(notices)


def _fields(names: Sequence[str], rows: Rows) -> pa.Array:
    """The further columns of every row as a JSON object of texts."""
    columns = [texts("input", name, rows).to_pylist() for name in names]
    objects = (dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True))
    return pa.array([json.dumps(each, ensure_ascii=False) for each in objects], pa.large_string())


def _names(files: Sequence[Source], columns: Columns, fields: Collection[str]) -> list[str]:
    """The columns of all files, each as often as the first file that has it."""
    names: list[str] = []
    for source in files:
        wanted = {*columns.explicit().values(), *fields} - set(names)
        own = [
            *_READERS[source.format].names(source, wanted - set(source.constants)),
            *source.constants,
        ]
        names += [name for name in own if name not in names]
        if source is files[0]:
            names = own
    return names


def _rows(source: Source, chosen: Chosen, clients: Collection[str] | None) -> Rows:
    """The chosen columns of one file; those that it does not have are null there."""
    own = set(_READERS[source.format].names(source)) if source.format != "json" else set()
    wanted = [name for name in chosen.names() if name not in source.constants]
    present = [name for name in wanted if source.format == "json" or name in own]
    if source.format == "parquet" and clients is not None and chosen.sources["client"] in present:
        rows = arrow_files.read(source, present, (chosen.sources["client"], clients))
    else:
        rows = _READERS[source.format].read(source, present)
    columns = dict(rows.columns)
    for name in wanted:
        if name not in columns:
            columns[name] = pa.chunked_array([pa.nulls(rows.length, pa.large_string())])
    for name, value in source.constants.items():
        columns[name] = pa.chunked_array([pa.repeat(pa.scalar(value), rows.length)])
    return Rows(columns, rows.length, rows.place)


def _of_clients(corpus: Corpus, wanted: set[str], place: str, source: str) -> Corpus:
    codes, owners = corpus.codes("client")
    if missing := wanted - set(owners):
        raise DataError(
            f"{place} has no rows of {len(missing)} of the selected clients, such as "
            f"'{min(missing)}'; the client names are in its column '{source}'."
        )
    if len(wanted) == len(owners):
        return corpus
    return corpus.select(np.array([owner in wanted for owner in owners])[codes])


def _splits(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Usual names of splits as the corpus's; others stay, and are refused with their name."""
    found = [str(name) for name in pc.unique(column).to_pylist()]
    usual = [SPLIT_NAMES.get(name.strip().casefold(), name) for name in found]
    if usual == found:
        return column
    plain = column.cast(pa.large_string())
    places = pc.index_in(plain, pa.array(found, pa.large_string()))
    return pa.chunked_array([pa.array(usual, pa.large_string()).take(places.combine_chunks())])


def _conversations(rows: Rows, chosen: Chosen, place: str) -> tuple[pa.Array, list[str], list[str]]:
    """The rows with something to learn, their conversations, and notices on the others."""
    source = chosen.sources["messages"]
    values = _values(rows, source)
    tools = _values(rows, chosen.tools) if chosen.tools else [None] * rows.length
    kept, conversations = [], []
    dropped = cut = several = 0
    for row, (value, described) in enumerate(zip(values, tools, strict=True)):
        try:
            conversation = None if value is None else parse(value, described)
        except Fault as fault:
            raise DataError(f"{rows.place(row)} column '{source}': {fault}.") from None
        if conversation is None:
            dropped += 1
            continue
        kept.append(row)
        conversations.append(conversation.text())
        if not is_text(conversations[-1]):
            raise DataError(
                f"{rows.place(row)} column '{source}': a message has half of a character (a lone "
                "surrogate such as \\ud83d); correct the text, or remove the row."
            )
        cut += conversation.messages_cut > 0
        several += conversation.earlier_answers > 0
    of = f"of {rows.length} conversations in {place}"
    notices = []
    if dropped:
        notices.append(f"{dropped} {of} have no answer of the assistant to learn and are left out.")
    if cut:
        notices.append(f"{cut} {of} continue after the last answer to learn and are cut there.")
    if several:
        notices.append(
            f"{several} {of} have several answers; only the last one is learnt, and the earlier "
            "ones are part of its prompt."
        )
    return pa.array(kept, pa.int64()), conversations, notices


def _values(rows: Rows, source: str) -> Sequence[object]:
    column = rows.columns[source]
    return column if isinstance(column, list) else column.to_pylist()
