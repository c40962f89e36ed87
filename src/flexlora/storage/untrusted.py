"""Untrusted text: JSON parsed strictly, and values made safe to print."""

from __future__ import annotations

import json
from typing import Any

from flexlora.errors import AdapterError


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


def short(value: object) -> str:
    """An untrusted value for an error message: printable, and at most about 140 characters."""
    text = str(value) if isinstance(value, Exception) else repr(value)
    text = printable(text)
    return text if len(text) <= 160 else f"{text[:80]}...{text[-60:]}"


def printable(text: str) -> str:
    """The text with ``?`` for every character that would not print, such as escape codes."""
    return "".join(c if c.isprintable() else "?" for c in text)
