"""The table ``[compare]`` of a config: the methods, seeds, settings and variants to compare."""

from __future__ import annotations

import itertools
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flexlora.errors import ConfigError

Values = Mapping[str, Any]
"""Values by dotted key, such as ``training.learning_rate``."""

_KEYS = ("methods", "seeds", "settings", "variants")
_FIXED = ("seed", "run", "method")
"""What a comparison itself decides."""
_ALTERNATIVES = ("rank", "distribution", "table")
"""Keys of ``ranks`` of which a config has one."""
_OF_TYPES = ("types", "clients")


@dataclass(frozen=True)
class ComparisonSettings:
    """What is compared beside methods.

    ``settings`` are values of the config, or options of the method (keys without a dot), by
    method. ``variants`` are values of the config by the name of the variant; every method is run
    with each of them.
    """

    methods: tuple[str, ...] = ()
    seeds: int | None = None
    settings: Mapping[str, Values] = field(default_factory=dict)
    variants: Mapping[str, Values] = field(default_factory=dict)


def read_comparison(path: Path) -> ComparisonSettings:
    """The table ``[compare]`` of a TOML file that can be read; nothing if it has none.

    Raises:
        ConfigError: a key is unknown or has a wrong type.
    """
    table = tomllib.loads(path.read_text(encoding="utf-8")).get("compare", {})
    place = f"{path}, [compare]"
    if not isinstance(table, dict):
        raise ConfigError(f"{place} is {table!r}; it is a table with {', '.join(_KEYS)}.")
    if unknown := [key for key in table if key not in _KEYS]:
        raise ConfigError(f"{place}: unknown key {unknown[0]!r}. Valid keys: {', '.join(_KEYS)}.")
    names, seeds = table.get("methods", []), table.get("seeds")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{place}: methods is {names!r}; give a list such as ['flexlora'].")
    if seeds is not None and (not isinstance(seeds, int) or isinstance(seeds, bool) or seeds < 1):
        raise ConfigError(f"{place}: seeds is {seeds!r}; give a whole number of at least 1.")
    settings, variants = (_tables(table, key, place) for key in ("settings", "variants"))
    return ComparisonSettings(tuple(names), seeds, settings, variants)


def varied(texts: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The variants of ``KEY=A,B`` texts: every combination of the values, each with its name.

    Raises:
        ConfigError: a text has no such form, or a key cannot be varied.
    """
    axes = []
    for text in texts:
        key, equals, listed = (part.strip() for part in text.partition("="))
        if not equals or not key or not listed:
            raise ConfigError(f"--vary takes KEY=A,B, such as ranks.rank=4,8,16, not {text!r}.")
        _check_key(key, f"--vary {text}")
        axes.append([(key, value) for value in _listed(listed)])
    variants = {}
    for combination in itertools.product(*axes) if axes else ():
        name = ", ".join(f"{key.rpartition('.')[2]}={_shown(v)}" for key, v in combination)
        variants[name] = dict(combination)
    return variants


def with_values(content: Mapping[str, Any], values: Values) -> dict[str, Any]:
    """A config as nested tables with these values.

    Of ``ranks`` a value replaces those that it excludes: ``ranks.rank`` the rank types.
    """
    changed: dict[str, Any] = dict(content)
    for key, value in values.items():
        *sections, last = key.split(".")
        table = changed
        for section in sections:
            inner = table.get(section)
            table[section] = dict(inner) if isinstance(inner, Mapping) else {}
            table = table[section]
        if sections == ["ranks"] and last in _ALTERNATIVES:
            for other in (*_ALTERNATIVES, *(_OF_TYPES if last == "rank" else ())):
                table.pop(other, None)
        table[last] = value
    return changed


def _tables(table: Mapping[str, Any], key: str, place: str) -> dict[str, dict[str, Any]]:
    """The tables of values in ``settings`` or ``variants``, with dotted keys."""
    inner = table.get(key, {})
    if not isinstance(inner, dict) or not all(isinstance(each, dict) for each in inner.values()):
        raise ConfigError(f"{place}: {key} is {inner!r}; it has a table for each name.")
    result = {name: dict(_flat(values)) for name, values in inner.items()}
    for name, values in result.items():
        for dotted in values:
            _check_key(dotted, f"{place}: {key}.{name}")
    return result


def _flat(table: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Values by dotted key; rank types, their shares and clients are values as a whole."""
    for key, value in table.items():
        name = f"{path}{key}"
        if isinstance(value, dict) and not name.startswith("ranks."):
            yield from _flat(value, f"{name}.")
        else:
            yield name, value


def _check_key(key: str, place: str) -> None:
    if any(key == fixed or key.startswith(f"{fixed}.") for fixed in _FIXED):
        raise ConfigError(
            f"{place}: {key!r} is set by the comparison itself: seeds by --seeds, methods by "
            "--methods, and an option of a method by --option METHOD.KEY=VALUE or in "
            "[compare.settings.METHOD]."
        )


def _listed(text: str) -> list[Any]:
    """Values between commas: TOML's, or else texts."""
    try:
        values: list[Any] = tomllib.loads(f"values = [{text}]")["values"]
    except tomllib.TOMLDecodeError:
        return [value.strip() for value in text.split(",") if value.strip()]
    return values


def _shown(value: Any) -> str:
    return re.sub(r"[{}'\s]", "", str(value))
