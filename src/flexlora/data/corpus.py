"""Training and evaluation rows: one example, and a corpus of examples in columns."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from flexlora.data.conversation import Message, stored
from flexlora.errors import DataError
from flexlora.seeds import rng

SPLITS: Final = ("train", "validation", "test")
KEYS: Final = ("client", "category", "split", "instruction")
SELECTABLE: Final = ("client", "category")
"""The key columns by whose values rows can be chosen."""
TEXTS: Final = ("input", "output", "messages", "fields")

_KEY_TYPE: Final = pa.dictionary(pa.int32(), pa.string())
_TEXT_TYPE: Final = pa.large_string()

Encoded: TypeAlias = pa.ChunkedArray | pa.Array
Column: TypeAlias = pa.ChunkedArray | pa.Array | Sequence[str]
Codes = np.ndarray[Any, np.dtype[np.int32]]


@dataclass(frozen=True)
class Example:
    """One row: an instruction, its input (may be empty) and the target output.

    A row of chat data has ``messages`` instead, the whole conversation; its last message is
    the assistant's and also the ``output``, while instruction and input are empty. ``tools``
    are the descriptions of functions that a conversation may call. ``fields`` are further
    columns, for a user's own prompt template.
    """

    instruction: str
    input: str
    output: str
    messages: tuple[Message, ...] | None = None
    tools: tuple[Any, ...] | None = None
    fields: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Corpus:
    """Examples in columns, as an Arrow table.

    The columns are strings: optionally ``client``, ``category`` and ``split``, then either
    ``instruction``, ``input`` and ``output`` (and ``fields``, JSON objects of further texts), or
    ``messages`` (JSON). Columns of repeated
    values (``KEYS``) are dictionary-encoded: if each client has one instruction, half a million
    rows take the memory of their inputs and outputs. No value is null. Build a corpus with
    ``Corpus.build`` or a reader of ``flexlora.data.corpora``.

    ``digests`` maps column names to hashes computed earlier, so that ``fingerprint`` need not
    read these columns again; see ``flexlora.data.corpora.mapped``. ``notices`` are sentences for
    the user on how the source was read, such as rows that were left out.

    Raises:
        DataError: the table does not have these columns and types.
    """

    table: pa.Table
    digests: Mapping[str, str] = field(default_factory=dict, repr=False)
    notices: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        names = set(self.table.column_names)
        if not (names >= {"instruction", "input", "output"}) ^ ("messages" in names):
            raise DataError(
                f"A corpus has either 'messages' or 'instruction', 'input' and 'output'; "
                f"this table's columns are {', '.join(self.table.column_names)}."
            )
        types = {**dict.fromkeys(KEYS, _KEY_TYPE), **dict.fromkeys(TEXTS, _TEXT_TYPE)}
        for column in self.table.schema:
            if column.type != types.get(column.name):
                raise DataError(
                    f"A corpus cannot have a column '{column.name}' of type {column.type}; build "
                    f"the corpus with Corpus.build, which takes {', '.join(types)}."
                )

    @classmethod
    def build(cls, columns: Mapping[str, Column], place: str = "the corpus") -> Corpus:
        """A corpus of these columns, each a sequence of strings or an Arrow array of them.

        ``place`` describes the source of the rows in errors, which count rows from 1.

        Raises:
            DataError: a value is null, a split is not one of ``SPLITS``, a conversation does
                not end with the assistant, or the columns are not those of a corpus.
        """
        return cls(_table({n: _encoded(n, values, place) for n, values in columns.items()}, place))

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of the columns."""
        return tuple(self.table.column_names)

    def example(self, row: int) -> Example:
        """The example of one row."""
        return self.examples([row])[0]

    def examples(self, rows: Iterable[int]) -> list[Example]:
        """The examples of these rows, in this order."""
        chosen = np.fromiter(rows, dtype=np.int64)
        names = [name for name in ("messages", *KEYS, *TEXTS) if name in self.columns]
        texts = {n for n in names if n in ("instruction", *TEXTS)}
        taken = {n: self.table[n].take(pa.array(chosen)).to_pylist() for n in texts}
        if "messages" in taken:
            return [_conversation(text) for text in taken["messages"]]
        rows_of_text = zip(taken["instruction"], taken["input"], taken["output"], strict=True)
        if "fields" not in taken:
            return [Example(*texts) for texts in rows_of_text]
        further = [json.loads(fields) for fields in taken["fields"]]
        pairs = zip(rows_of_text, further, strict=True)
        return [Example(*texts, fields=fields) for texts, fields in pairs]

    def keys(self, column: str) -> np.ndarray[Any, np.dtype[np.object_]]:
        """A key column's value for every row, as an object array (rows,) of strings.

        The strings are shared, not copied: the cost is one pointer per row.

        Raises:
            DataError: the corpus has no such column, or it is not one of ``KEYS``.
        """
        codes, values = self.codes(column)
        shared = np.empty(len(values), object)
        shared[:] = values
        keys: np.ndarray[Any, np.dtype[np.object_]] = shared[codes]
        return keys

    def codes(self, column: str) -> tuple[Codes, list[str]]:
        """A key column as numbers (rows,) and the list of values that they index.

        The values are those that occur, in order of first appearance. Four bytes per row.

        Raises:
            DataError: the corpus has no such column, or it is not one of ``KEYS``.
        """
        if column not in KEYS or column not in self.columns:
            raise DataError(
                f"The corpus has no key column '{column}'; it has "
                f"{', '.join(n for n in self.columns if n in KEYS) or 'none'}. Set "
                f"data.columns.{column} to the name in the source, or add the column with "
                "Corpus.with_column."
            )
        chunks = self.table[column].unify_dictionaries().chunks
        if not chunks:
            return np.empty(0, np.int32), []
        indices = [chunk.indices.to_numpy(zero_copy_only=False) for chunk in chunks]
        codes = np.concatenate(indices) if len(indices) > 1 else indices[0]
        values = chunks[0].dictionary
        # Written backwards, so that the first row of each value remains.
        first = np.full(len(values), len(codes))
        first[codes[::-1]] = np.arange(len(codes) - 1, -1, -1)
        used = np.argsort(first, kind="stable")[: np.count_nonzero(first < len(codes))]
        new_code = np.zeros(len(values), np.int32)
        new_code[used] = np.arange(len(used), dtype=np.int32)
        return new_code[codes], values.take(pa.array(used)).to_pylist()

    def select(self, rows: np.ndarray[Any, Any] | Sequence[int] | Sequence[bool]) -> Corpus:
        """The corpus of these rows, given as indices or as a boolean mask (rows,)."""
        chosen = np.asarray(rows)
        if chosen.dtype == np.bool_:
            if len(chosen) != len(self):
                raise DataError(
                    f"A mask of {len(chosen)} values cannot choose among {len(self)} rows."
                )
            chosen = np.flatnonzero(chosen)
        taken = self.table.take(pa.array(chosen.astype(np.int64)))
        return Corpus(taken.unify_dictionaries().combine_chunks(), notices=self.notices)

    def with_column(self, column: str, values: Column) -> Corpus:
        """The corpus with this column added or replaced, such as the clients of a partition."""
        new = _encoded(column, values, "the corpus")
        columns = {name: self.table[name] for name in self.columns}
        digests = {name: digest for name, digest in self.digests.items() if name != column}
        return Corpus(_table({**columns, column: new}, "the corpus"), digests, self.notices)

    def noting(self, notices: Iterable[str]) -> Corpus:
        """The corpus with these notices in addition."""
        return replace(self, notices=(*self.notices, *notices))

    def fingerprint(self) -> str:
        """A hash of the content: equal for equal rows in equal order, however they are stored.

        Cost: one pass over the bytes of the columns that are not in ``digests``, about half a
        second for half a million rows.
        """
        digest = hashlib.blake2b(digest_size=16)
        for name in sorted(self.columns):
            digest.update(f"{name}:{len(self)}:{self.digest(name)}".encode())
        return digest.hexdigest()

    def digest(self, column: str) -> str:
        """A hash of one column's values in order."""
        if column in self.digests:
            return self.digests[column]
        digest = hashlib.blake2b(digest_size=16)
        if column in KEYS:
            codes, values = self.codes(column)
            digest.update(codes.tobytes())
            _hash_text(digest, [pa.array(values, _TEXT_TYPE)])
        else:
            _hash_text(digest, self.table[column].chunks)
        return digest.hexdigest()


def concatenated(parts: Sequence[Corpus], notices: Iterable[str] = ()) -> Corpus:
    """The rows of several corpora with the same columns, one after the other."""
    every = (*notices, *(notice for part in parts for notice in part.notices))
    if len(parts) == 1:
        return replace(parts[0], notices=tuple(dict.fromkeys(every)))
    tables = [part.table.select(parts[0].columns) for part in parts]
    whole = pa.concat_tables(tables).unify_dictionaries().combine_chunks()
    return Corpus(whole, notices=tuple(dict.fromkeys(every)))


def split_rows(corpus: Corpus, seed: int) -> Corpus:
    """The corpus with a random ``split`` column: 80 / 10 / 10 percent within each client.

    A tenth is rounded to the nearest row (so that a client with fewer than five rows has only
    training rows), and every client has a training row. A client's split depends only on the
    seed, its name and its number of rows.

    Raises:
        DataError: the corpus already has splits, or has no clients.
    """
    if "split" in corpus.columns:
        raise DataError(
            "The corpus already has a 'split' column; set data.columns.split = \"\" to draw new "
            "splits."
        )
    codes, clients = corpus.codes("client")
    splits = np.zeros(len(corpus), np.int32)
    order = np.argsort(codes, kind="stable")
    bounds = np.searchsorted(codes[order], np.arange(len(clients) + 1))
    for client, start, stop in zip(clients, bounds[:-1], bounds[1:], strict=True):
        rows = rng(seed, "split", client).permutation(order[start:stop])
        tenth = (len(rows) + 5) // 10
        splits[rows[:tenth]] = SPLITS.index("validation")
        splits[rows[tenth : 2 * tenth]] = SPLITS.index("test")
    return corpus.with_column("split", pa.DictionaryArray.from_arrays(splits, list(SPLITS)))


def _table(arrays: Mapping[str, pa.ChunkedArray], place: str) -> pa.Table:
    lengths = {name: len(array) for name, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        raise DataError(f"The columns of {place} differ in length: {lengths}; give equal lengths.")
    return pa.table(dict(arrays)).unify_dictionaries().combine_chunks()


def _encoded(name: str, values: Column, place: str) -> pa.ChunkedArray:
    """The values in the column's type, checked; errors name the first faulty row."""
    column = _typed(name, values, place)
    if name == "split":
        _check_splits(column, place)
    if name == "messages":
        _check_conversations(column, place)
    return column


def _typed(name: str, values: Column, place: str) -> pa.ChunkedArray:
    if isinstance(values, pa.ChunkedArray):
        column = values
    elif isinstance(values, pa.Array):
        column = pa.chunked_array([values])
    else:
        column = pa.chunked_array([pa.array(_strings(name, values, place), _TEXT_TYPE)])
    if column.null_count:
        row = pc.index(column.is_null(), pa.scalar(True)).as_py() + 1
        raise DataError(
            f"Column '{name}' of {place} is null in row {row}; fill or drop such rows "
            f"({column.null_count} in total)."
        )
    if name not in KEYS:
        return column.cast(_TEXT_TYPE)
    if column.type == _KEY_TYPE:
        return column
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    return column.cast(pa.string()).dictionary_encode().cast(_KEY_TYPE)


def _strings(name: str, values: Sequence[str], place: str) -> list[str]:
    for row, value in enumerate(values, 1):
        if not isinstance(value, str):
            got = "null" if value is None else f"{value!r}, a {type(value).__name__}"
            raise DataError(
                f"Column '{name}' of {place} needs text, but row {row} has {got}; convert it to "
                "text in the source."
            )
    return list(values)


def _check_splits(column: pa.ChunkedArray, place: str) -> None:
    for value in pc.unique(column).to_pylist():
        if value not in SPLITS:
            raise DataError(
                f"Column 'split' of {place} contains '{value}'; the splits are "
                f"{', '.join(SPLITS)}. Rename the value in the source, or set "
                'data.columns.split = "" to draw new splits.'
            )


def _check_conversations(column: pa.ChunkedArray, place: str) -> None:
    for row, text in enumerate(column.to_pylist(), 1):
        fault = _fault(text)
        if fault:
            raise DataError(f"Column 'messages' of {place}, row {row}: {fault}.")


def _fault(text: str) -> str | None:
    """What is wrong with a conversation in JSON, or None."""
    try:
        messages, _ = stored(text)
    except (ValueError, KeyError, TypeError):
        return "the text is not JSON; give a list of {role, content}"
    if len(messages) < 2:
        return "a conversation is a list of at least two {role, content} messages"
    for message in messages:
        if not isinstance(message, dict) or not message.keys() >= {"role", "content"}:
            return f"a message needs the keys 'role' and 'content', and is {message!r:.80}"
        if not (isinstance(message["role"], str) and isinstance(message["content"], str)):
            return f"role and content must be text, not {message!r:.80}"
    if messages[-1]["role"] != "assistant":
        return f"the last message must have the role 'assistant', not {messages[-1]['role']!r}"
    return None


def _conversation(text: str) -> Example:
    messages, tools = stored(text)
    return Example("", "", messages[-1]["content"], messages, tools)


def _hash_text(digest: hashlib.blake2b, chunks: Sequence[pa.LargeStringArray]) -> None:
    """Hash all lengths, then all bytes, without a copy; independent of the chunks."""
    spans = []
    for chunk in chunks:
        if len(chunk):
            _, offsets, data = chunk.buffers()
            ends = np.frombuffer(offsets, np.int64)[chunk.offset : chunk.offset + len(chunk) + 1]
            digest.update(np.diff(ends).tobytes())
            spans.append((data, ends[0], ends[-1]))
    for data, start, stop in spans:
        if data is not None:
            digest.update(memoryview(data)[start:stop])
