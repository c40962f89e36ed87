"""The fields of a message's own header: which ones each kind of message has, and their values.

The header is JSON in the metadata of a safetensors file. A field that is not in the table of its
kind is refused, and so is a value of another type or out of its range, before it is used.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from flexlora.storage.untrusted import RefusalCode, RefusedBytes, parse_json, short
from flexlora.wire.refused import RefusedMessage

FORMAT = 2
"""Raised whenever messages change; 1 was that of earlier development versions."""

NUMBER_CHARACTERS = 25
"""What every fact takes in a header: the digits of a time must not change a message's length."""

LONGEST_NAME = 500
"""In characters: of a client, a module or a section."""

LARGEST_FACT = 1e15
"""No count, sum or time of a client's training is larger."""

MOST_ROUNDS = 10**9
MOST_COMPONENTS = 2**31
MOST_INT = 2**62


@dataclass(frozen=True)
class Field:
    """What a field's value is, in words and as a check."""

    what: str
    fits: Callable[[Any], bool]
    required: bool = False


def is_name(value: object) -> bool:
    """Whether a value is a printable text that is not too long for a name."""
    return isinstance(value, str) and 0 < len(value) <= LONGEST_NAME and value.isprintable()


def is_count(value: object, least: int = 0, most: int = MOST_INT) -> bool:
    """Whether a value is a whole number in this range; true and false are none."""
    return type(value) is int and least <= value <= most


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= LARGEST_FACT


def _is_table(value: Any, fits: Callable[[Any], bool]) -> bool:
    return isinstance(value, dict) and all(is_name(n) and fits(v) for n, v in value.items())


def _are_ids(value: Any) -> bool:
    whole = isinstance(value, list) and all(is_count(n, 0, MOST_COMPONENTS) for n in value)
    return whole and len(set(value)) == len(value)


def _are_rounds(value: Any) -> bool:
    whole = isinstance(value, list) and all(is_count(n, 1, MOST_ROUNDS) for n in value)
    return whole and len(set(value)) == len(value)


_IDS = Field("distinct numbers of components by module", lambda v: _is_table(v, _are_ids))
_SPARSE = Field("a table of the sparse tensors", lambda v: isinstance(v, dict))

FIELDS: Mapping[str, Mapping[str, Field]] = {
    "upload": {
        "client": Field("a name", is_name, required=True),
        "round": Field("a round", lambda v: is_count(v, 0, MOST_ROUNDS), required=True),
        "examples": Field("a whole number", lambda v: is_count(v, -MOST_INT), required=True),
        "facts": Field("numbers by name", lambda v: _is_table(v, _is_number), required=True),
        "component_ids": _IDS,
        "sparse": _SPARSE,
    },
    "download": {
        "factors": Field("BA, B or A", lambda v: v in ("BA", "B", "A")),
        "learning_rate_factor": Field(
            "a number between 0 and a million", lambda v: _is_number(v) and 0 < v < 1e6
        ),
        "base_rounds": Field("a list of distinct rounds", _are_rounds),
        "ranks": Field(
            "ranks by module", lambda v: _is_table(v, lambda n: is_count(n, 0, MOST_COMPONENTS))
        ),
        "ints": Field(
            "whole numbers by name", lambda v: _is_table(v, lambda n: is_count(n, -MOST_INT))
        ),
        "component_ids": _IDS,
        "sparse": _SPARSE,
    },
    "private": {},
    "state": {},
    "adapter": {},
}
"""The fields of each kind of message, beside ``format`` and ``kind``, which all have."""

_UPDATE = re.compile(r"update [1-9][0-9]{0,8}", re.ASCII)


def header_text(fields: Mapping[str, Any]) -> str:
    """The fields of a header as they travel, padded so that facts always take the same length.

    Raises:
        ValueError: they are not valid JSON.
    """
    text = json.dumps({"format": FORMAT, **fields}, sort_keys=True, allow_nan=False)
    facts = fields.get("facts", {}).values()
    return text + " " * sum(NUMBER_CHARACTERS - len(json.dumps(value)) for value in facts)


def parsed(text: str | None, kind: str | None, place: object) -> dict[str, Any]:
    """The fields of a header from its text, each checked; with ``kind`` only those of this kind.

    Raises:
        RefusedMessage: the text is not the header of such a message.
    """
    try:
        fields = parse_json(text.encode()) if isinstance(text, str) else None
    except (ValueError, RecursionError) as error:
        code = error.code if isinstance(error, RefusedBytes) else RefusalCode.NOT_JSON
        raise RefusedMessage(
            code, f"{place}: its flexlora header is not JSON: {short(error)}."
        ) from error
    given = fields.get("format") if isinstance(fields, dict) else None
    if not isinstance(fields, dict) or type(given) is not int or given != FORMAT:
        raise RefusedMessage(
            RefusalCode.WRONG_FORMAT,
            f"{place}: it has format {short(given)}; this version reads format {FORMAT}. "
            f"Run the same version of flexlora on both sides.",
        )
    name = fields.get("kind")
    if not isinstance(name, str) or name not in FIELDS or kind not in (None, name):
        wanted = f"kind {kind!r}" if kind else f"one of the kinds {', '.join(FIELDS)}"
        raise RefusedMessage(
            RefusalCode.WRONG_KIND, f"{place}: expected a message of {wanted}, not {short(name)}."
        )
    _check(fields, name, place)
    return fields


def _check(fields: Mapping[str, Any], kind: str, place: object) -> None:
    """Refuse fields that messages of this kind do not have, or that have other values."""
    table = FIELDS[kind]
    for name in fields:
        if name not in table and name not in ("format", "kind"):
            raise RefusedMessage(
                RefusalCode.UNKNOWN_KEY, f"{place}: the {kind} has an unknown field {short(name)}."
            )
    for name, field in table.items():
        if name not in fields:
            if field.required:
                raise RefusedMessage(
                    RefusalCode.MISSING_KEY, f"{place}: the {kind} has no field {name!r}."
                )
        elif not field.fits(fields[name]):
            raise RefusedMessage(
                RefusalCode.IMPOSSIBLE_FACT if name == "facts" else RefusalCode.WRONG_TYPE,
                f"{place}: the {kind}'s {name!r} is {short(fields[name])}, not {field.what}.",
            )


def is_section(name: str, kind: str) -> bool:
    """Whether a message of this kind may have a section of this name beside its own adapter."""
    if kind == "private":
        return is_name(name)
    beside = kind in ("upload", "download") and name.startswith("aux ") and is_name(name[4:])
    return beside or (kind == "download" and (name == "frozen" or bool(_UPDATE.fullmatch(name))))
