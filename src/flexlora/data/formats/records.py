"""JSON: one object a line, an array of objects, or objects over several lines."""

from __future__ import annotations

import itertools
import json
import re
from array import array
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, Final

from flexlora.data.format import Source
from flexlora.data.rows import Rows, WrittenFloat
from flexlora.errors import DataError

_PEEKED: Final = 1000
"""Records whose keys are looked at, since not every record has every key."""

_WRAPPERS: Final = ("data", "rows", "examples", "instances", "train")
"""Keys of an object that is around the list of rows."""


def names(source: Source, wanted: Collection[str] = ()) -> list[str]:
    """The keys of the first thousand records, or of more until all that are wanted occurred."""
    missing = set(wanted)
    keys: dict[str, None] = {}
    for position, (number, record) in enumerate(records(source)):
        if position >= _PEEKED and not missing:
            break
        keys |= dict.fromkeys(_checked(record, place(source, number)))
        missing -= keys.keys()
    return list(keys)


def read(source: Source, columns: Collection[str]) -> Rows:
    """These columns; a record without one of the keys has null there."""
    return rows(records(source), columns, lambda number: place(source, number))


_UNREADABLE = (ValueError, RecursionError)
"""What Python's JSON parser raises, of which ``JSONDecodeError`` is one."""


def rows(numbered: Iterable[tuple[int, Any]], columns: Collection[str], place: Any) -> Rows:
    """These columns of records, each given with its number, from which ``place`` says where it is.

    Raises:
        DataError: a record is not an object.
    """
    values: dict[str, list[Any]] = {name: [] for name in columns}
    numbers = array("q")
    for number, record in numbered:
        checked = _checked(record, place(number))
        for name, column in values.items():
            column.append(checked.get(name))
        numbers.append(number)
    return Rows(values, len(numbers), lambda row: place(numbers[row]))


def place(source: Source, number: int) -> str:
    """Where a record is, for errors."""
    return f"{source.place}, {'row' if source.is_array else 'line'} {number},"


def records(source: Source) -> Iterator[tuple[int, Any]]:
    """The records with their numbers from 1: of the line, or of the item in an array.

    Raises:
        DataError: the text is not JSON.
    """
    if source.is_array:
        with source.text() as stream:
            yield from enumerate(_whole(stream.read(), source), 1)
        return
    with source.text() as stream:
        lines = ((number, line) for number, line in enumerate(stream, 1) if line.strip())
        first, second = next(lines), next(lines, None)
        try:
            record = _parsed(first[1])
        except json.JSONDecodeError:
            stream.seek(0)
            yield from enumerate(_unwrapped(_objects(stream.read(), source), source), 1)
            return
        if second is None:
            yield from enumerate(_unwrapped([record], source), first[0])
            return
        yield first[0], record
        for number, line in itertools.chain([second], lines):
            yield number, _line(line, source, number)


def _line(line: str, source: Source, number: int) -> Any:
    try:
        return _parsed(line)
    except json.JSONDecodeError as error:
        raise DataError(_not_json(source, number, error)) from error


def _parsed(text: str) -> Any:
    text = text.lstrip("\ufeff")
    try:
        return json.loads(text, parse_float=WrittenFloat, object_pairs_hook=_without_duplicates)
    except _UNREADABLE as error:
        raise _refused(error) from error


def _refused(error: ValueError | RecursionError) -> ValueError:
    """The error of a JSON parser; that of what Python does not read at all is a sentence."""
    if isinstance(error, json.JSONDecodeError | DataError):
        return error
    return DataError(
        "A record has a number of more than 4300 digits, or hundreds of lists in each other; "
        "write the number as text, or leave the record out."
    )


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise DataError(
            f"A record has the key '{twice}' twice, so it is not clear which value is meant: "
            f"{json.dumps(content, ensure_ascii=False, default=str)[:80]}; remove one of them."
        )
    return content


def _whole(text: str, source: Source) -> list[Any]:
    try:
        return list(_parsed(text))
    except json.JSONDecodeError as error:
        raise DataError(_not_json(source, error.lineno, error)) from error


def _objects(text: str, source: Source) -> list[Any]:
    """Objects that follow each other, each over one or more lines."""
    decoder = json.JSONDecoder(parse_float=WrittenFloat, object_pairs_hook=_without_duplicates)
    found, position = [], 0
    text = text.lstrip("\ufeff").rstrip()
    while position < len(text):
        position = re.compile(r"\s*").match(text, position).end()  # type: ignore[union-attr]
        try:
            value, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise DataError(_not_json(source, error.lineno, error)) from error
        except _UNREADABLE as error:
            raise _refused(error) from error
        found.append(value)
    return found


def _unwrapped(values: list[Any], source: Source) -> list[Any]:
    """The rows inside of a single object that only wraps their list, else the values."""
    if len(values) != 1 or not isinstance(values[0], dict):
        return values
    (content,) = values
    lists = {
        key: value
        for key, value in content.items()
        if key in _WRAPPERS and isinstance(value, list) and all(isinstance(v, dict) for v in value)
    }
    if len(lists) == 1:
        return next(iter(lists.values()))
    columns = list(content.values())
    if len(columns) > 1 and all(
        isinstance(column, dict) and column.keys() == columns[0].keys() for column in columns
    ):
        raise DataError(
            f"{source.place} has columns and not rows, as pandas writes JSON by default; write "
            "it with frame.to_json(path, orient='records', lines=True)."
        )
    return values


def _not_json(source: Source, line: int, error: json.JSONDecodeError) -> str:
    excerpt = error.doc[max(error.pos - 10, 0) : error.pos + 20].strip()
    return (
        f"{source.place}, line {line}, is not JSON at character {error.colno} "
        f"({json.dumps(excerpt, ensure_ascii=False)}); correct the line, or remove it."
    )


def _checked(record: Any, place: str) -> Mapping[str, Any]:
    """A record as an object; a list of messages is a conversation.

    Raises:
        DataError: it is neither.
    """
    if isinstance(record, Mapping):
        return record
    if (
        isinstance(record, list)
        and record
        and all(isinstance(each, dict) and each.keys() & {"role", "from"} for each in record)
    ):
        return {"messages": record}
    raise DataError(
        f"{place} is {json.dumps(record, ensure_ascii=False)[:60]}; it must be a JSON object with "
        "the columns as keys."
    )


def head(source: Source, most: int) -> dict[str, list[Any]]:
    """The values of all columns in the first rows."""
    first = [record for _, record in itertools.islice(records(source), most)]
    return {
        name: [each.get(name) for each in first if isinstance(each, dict)] for name in names(source)
    }


def count(source: Source) -> int:
    """The number of rows; the whole text is parsed."""
    return sum(1 for _ in records(source))
