"""Untrusted bytes: JSON parsed strictly, values made safe to print, codes of what is refused."""

from __future__ import annotations

import json
import math
import reprlib
import unicodedata
from collections.abc import Iterator
from enum import StrEnum
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


class RefusalCode(StrEnum):
    """Why untrusted bytes are refused; for programs, and stable from version to version.

    The sentence of the error beside it is for people. Every code but the last two says that the
    sender is at fault.
    """

    WRONG_SIZE = "wrong_size"
    """The message is larger than an expected one can be, or not as long as its header says."""

    CUT_OFF = "cut_off"
    """The message ends within its header or within its tensors."""

    HEADER_TOO_LONG = "header_too_long"
    """The header has more bytes than an expected one can have."""

    NOT_JSON = "not_json"
    """A header is not JSON in UTF-8, is nested too deeply, or has a number without bounds."""

    DUPLICATE_KEY = "duplicate_key"
    """An object in a header has a key twice."""

    UNKNOWN_KEY = "unknown_key"
    """A header has a key that its kind of message does not have."""

    MISSING_KEY = "missing_key"
    """A header lacks a key that its kind of message must have."""

    WRONG_TYPE = "wrong_type"
    """A value in a header has another type, or lies out of its range."""

    WRONG_FORMAT = "wrong_format"
    """The message has another format number, so that it is of another version."""

    WRONG_KIND = "wrong_kind"
    """The message is of another kind, such as a download in place of an upload."""

    WRONG_CLIENT = "wrong_client"
    """The upload names another client."""

    WRONG_ROUND = "wrong_round"
    """The upload names another round."""

    WRONG_EXAMPLES = "wrong_examples"
    """The upload counts no examples, or more than the client has."""

    IMPOSSIBLE_FACT = "impossible_fact"
    """A fact about the training cannot be true."""

    UNKNOWN_TENSOR = "unknown_tensor"
    """A tensor, a module or a section that is not expected."""

    MISSING_TENSOR = "missing_tensor"
    """A tensor, a module or a section that is expected is not there."""

    WRONG_DTYPE = "wrong_dtype"
    """A tensor has another dtype."""

    WRONG_SHAPE = "wrong_shape"
    """A tensor is no matrix, or not one of the expected shape."""

    WRONG_RANK = "wrong_rank"
    """A module has a rank that is not expected, or its two factors have different ones."""

    WRONG_OFFSETS = "wrong_offsets"
    """Tensors overlap, leave a gap, or do not have as many bytes as their shapes take."""

    WRONG_SPARSE = "wrong_sparse"
    """A tensor without its zeros is not the matrix that the header says."""

    TOO_LARGE_CHANGE = "too_large_change"
    """The upload would change the model many times more than the others do."""

    CANCELLING = "cancelling"
    """A product is what is left of terms that are many times larger."""

    WRONG_COMPONENTS = "wrong_components"
    """The numbers of components are not those of distinct components of the modules."""

    NOT_FINITE = "not_finite"
    """A tensor has NaN or infinity."""

    TOO_LARGE = "too_large"
    """A tensor's norm, or what the message would take in memory, is above the limit."""

    UNREADABLE = "unreadable"
    """The disk did not give the bytes back; no fault of the sender."""

    UNEXPECTED = "unexpected"
    """An error that no check foresees: a fault of this library, to be reported."""


class RefusedBytes(AdapterError):
    """Untrusted bytes that fail a check; ``code`` says which."""

    def __init__(self, code: RefusalCode, reason: str) -> None:
        super().__init__(reason)
        self.code = code


def parse_json(data: bytes) -> Any:
    """Parse JSON in UTF-8 without duplicate keys, NaN or infinity.

    Raises:
        RefusedBytes: an object has a key twice, or a number is NaN or infinite.
        ValueError: the bytes are not UTF-8 or not JSON.
        RecursionError: the values are nested too deeply.
    """

    def without_duplicates(items: list[tuple[str, Any]]) -> dict[str, Any]:
        pairs: dict[str, Any] = {}
        for name, value in items:
            if name in pairs:
                raise RefusedBytes(
                    RefusalCode.DUPLICATE_KEY, f"the key {short(name)} appears twice"
                )
            pairs[name] = value
        return pairs

    def refuse_constant(name: str) -> float:
        raise RefusedBytes(RefusalCode.NOT_JSON, f"{name} is not JSON")

    def finite(text: str) -> float:
        number = float(text)
        if not math.isfinite(number):
            raise RefusedBytes(
                RefusalCode.NOT_JSON, f"the number {short(text)} is too large for JSON"
            )
        return number

    return json.loads(
        data.decode("utf-8"),
        object_pairs_hook=without_duplicates,
        parse_constant=refuse_constant,
        parse_float=finite,
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
    whole = text if isinstance(text, str) else _shown(text)
    # Blanks are joined, so that a little more than ``most`` may be needed.
    line = printable(" ".join(whole[: 2 * most + 20].split()))
    is_cut = len(line) > most or len(whole) > 2 * most + 20
    return f"{line[: most - 3]}..." if is_cut else line


def short(value: object) -> str:
    """An untrusted value for an error message: printable, and at most about 140 characters."""
    text = _shown(value)
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


def _shown(value: object) -> str:
    return str(value) if isinstance(value, Exception) else _represented(value)


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
