"""Untrusted text: JSON parsed strictly, and values made safe to print."""

from __future__ import annotations

import json
import reprlib
import unicodedata
from collections.abc import Iterator
from typing import Any, Final

from flexlora.errors import AdapterError

_BLANK_LETTERS: Final = frozenset("\u115f\u1160\u2800\u3164\uffa0")
"""Characters that Unicode counts as letters or symbols, and that show nothing."""

_MOST_MARKS: Final = 3
"""Accents on one letter; the scripts of all languages need fewer than this."""

_LONGEST_ITEM: Final = 200
"""Characters of one text that ``short`` looks at."""

_MOST_BITS: Final = 14_000
"""Python spells out integers of up to 4300 digits, some 14,280 bits."""

_FEW: Final = 40
_SKETCHED: Final = reprlib.Repr()
"""Shows a few values of each container, three containers deep."""
_SKETCHED.maxlevel, _SKETCHED.maxlong = 3, _LONGEST_ITEM
_SKETCHED.maxstring = _SKETCHED.maxother = _LONGEST_ITEM


def parse_json(data: bytes) -> Any:
    """Parse JSON in UTF-8 without duplicate keys, NaN or infinity.

    Raises:
        AdapterError: an object has a key twice, or a number is NaN or infinite.
        ValueError: the bytes are not UTF-8 or not JSON.
        RecursionError: the values are nested too deeply.
    """

    def without_duplicates(items: list[tuple[str, Any]]) -> dict[str, Any]:
        pairs = dict(items)
        if len(pairs) != len(items):
            names = [name for name, _ in items]
            duplicate = next(name for name in names if names.count(name) > 1)
            raise AdapterError(f"the key {short(duplicate)} appears twice")
        return pairs

    def refuse_constant(name: str) -> float:
        raise AdapterError(f"{name} is not JSON")

    return json.loads(
        data.decode("utf-8"), object_pairs_hook=without_duplicates, parse_constant=refuse_constant
    )


def one_line(text: object, most: int = 500) -> str:
    """Text of strangers in one line of at most ``most`` printable characters.

    It may come from a client, a server or a file of another run, and goes to a terminal, a
    journal, a log or a page. Spaces and line breaks of any kind become one space, and ``?`` stands
    for what does not print: escape codes, half surrogates, characters that are invisible or
    reverse the direction of a line, and accents piled upon one letter. Of a longer text the
    beginning is left, with dots at the end. A value that is no text is shown as Python would.
    Costs no more than ``most``, however long the text is.
    """
    whole = text if isinstance(text, str) else _represented(text)
    # Blanks are joined, so that a little more than ``most`` may be needed.
    line = printable(" ".join(whole[: 2 * most + 20].split()))
    is_cut = len(line) > most or len(whole) > 2 * most + 20
    return f"{line[: most - 3]}..." if is_cut else line


def short(value: object) -> str:
    """An untrusted value for an error message: printable, and at most about 140 characters."""
    text = str(value) if isinstance(value, Exception) else _represented(value)
    text = printable(text if len(text) <= 160 else f"{text[:80]}...{text[-60:]}")
    return text


def printable(text: str) -> str:
    """The text with ``?`` for every character that would not print, such as escape codes.

    So are characters that show nothing, and every accent from the fourth on one letter.
    """
    if text.isascii():
        return text if text.isprintable() else "".join(c if c.isprintable() else "?" for c in text)
    return "".join(_visible(text))


def printable_lines(text: str) -> str:
    """The text with its line breaks, and each of its lines printable."""
    return "\n".join(map(printable, text.replace("\t", " ").split("\n")))


def _visible(text: str) -> Iterator[str]:
    marks = 0
    for c in text:
        marks = marks + 1 if unicodedata.category(c) in ("Mn", "Me") else 0
        yield c if c.isprintable() and c not in _BLANK_LETTERS and marks <= _MOST_MARKS else "?"


def _represented(value: object) -> str:
    """As ``repr`` shows a value, at no more cost than what is shown of it is worth."""
    if isinstance(value, str) and len(value) > 2 * _LONGEST_ITEM:
        return repr(f"{value[:_LONGEST_ITEM]}...{value[-_LONGEST_ITEM:]}")
    if isinstance(value, bytes | bytearray) and len(value) > 2 * _LONGEST_ITEM:
        return f"{bytes(value[:_LONGEST_ITEM])!r}..."
    if isinstance(value, int) and value.bit_length() > _MOST_BITS:
        return f"an integer of {value.bit_length()} bits"  # Python refuses to spell long ones out
    if isinstance(value, list | tuple | dict | set | frozenset):
        try:
            return repr(value) if _is_small(value) else _SKETCHED.repr(value)
        except ValueError:  # a number too long to be spelt out
            return f"a {type(value).__name__} of {len(value)} values"
    return repr(value)


def _is_small(
    values: list[Any] | tuple[Any, ...] | dict[Any, Any] | set[Any] | frozenset[Any],
) -> bool:
    """Whether there are few values, and none contains others or is long."""
    if len(values) > _FEW:
        return False
    items = [*values, *values.values()] if isinstance(values, dict) else values
    return all(
        item is None
        or isinstance(item, float)
        or (isinstance(item, str) and len(item) <= _LONGEST_ITEM)
        or (isinstance(item, int) and item.bit_length() <= _MOST_BITS)
        for item in items
    )
