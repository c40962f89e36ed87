"""The config of a run as TOML text."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any


def toml(config: Mapping[str, Any]) -> str:
    """A config as TOML text, which loads as the same config.

    TOML has no null: keys without a value are left out, except that a column that the data does
    not have is written as "", because its default is a name.
    """
    return "".join(f"{line}\n" for line in _lines(_named(config), ())).strip("\n") + "\n"


def _named(config: Mapping[str, Any]) -> Mapping[str, Any]:
    data = config.get("data")
    columns = data.get("columns") if isinstance(data, Mapping) else None
    if not isinstance(data, Mapping) or not isinstance(columns, Mapping):
        return config
    names = {key: "" if name is None else name for key, name in columns.items()}
    return {**config, "data": {**data, "columns": names}}


def _lines(table: Mapping[str, Any], path: tuple[str, ...]) -> list[str]:
    """Plain keys first, then a section for each inner table."""
    plain = [
        f"{_key(key)} = {_value(value)}"
        for key, value in table.items()
        if value is not None and not isinstance(value, Mapping)
    ]
    head = [f"[{'.'.join(map(_key, path))}]"] if path else []
    lines = [*head, *plain, ""]
    for key, value in table.items():
        if isinstance(value, Mapping):
            lines += _lines(value, (*path, key))
    return lines


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _value(key)


def _value(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(_value(v) for v in value if v is not None)}]"
    if isinstance(value, Mapping):
        pairs = (f"{_key(k)} = {_value(v)}" for k, v in value.items() if v is not None)
        return f"{{{', '.join(pairs)}}}"
    if isinstance(value, float):
        return repr(value)
    # A JSON string is a TOML string except for the delete character.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
