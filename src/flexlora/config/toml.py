"""TOML files: reading with line numbers, ``--set`` changes and absolute paths; and writing."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w

from flexlora.config.experiment import Experiment, Ranks, parse, parse_ranks
from flexlora.data import TEMPLATE_SUFFIXES
from flexlora.errors import ConfigError
from flexlora.storage import expanded

_TABLE = re.compile(r"^\s*\[\s*([^\[\]]+?)\s*\]\s*(#.*)?$")
_ARRAY = re.compile(r"^\s*\[\[\s*([^\[\]]+?)\s*\]\]\s*(#.*)?$")
_WRITTEN_BY = {
    "config": " (flexlora init writes one)",
    "file of jobs": " (flexlora configs jobs copies one)",
}
_KEY = re.compile(r"""^\s*([A-Za-z0-9_\-."']+)\s*=""")


def load(path: Path | str, changes: Sequence[str] = ()) -> Experiment:
    """The experiment in a TOML file, with ``a.b=value`` changes applied.

    In the file ``data.path``, ``ranks.table`` and a template in ``data.prompt`` are relative to
    the file; in a change they are, as all other paths, relative to the working folder.

    Raises:
        ConfigError: the file cannot be read, or a key is unknown or has a wrong type; names all
            such keys, with their lines.
    """
    path = _checked_path(path)
    text, content = read_toml(path, "config")
    if "job" in content:
        raise ConfigError(f"{path} is a file of jobs; train them with: flexlora train {path}")
    places = {key: f"{path}, line {line}" for key, line in lines_of(text).items()}
    # Read by their own commands; a single run has nothing to compare and no attacker.
    content.pop("compare", None)
    content.pop("attack", None)
    changed = apply_changes(content, changes)
    make_paths_absolute(content, path.parent, changed)
    return parse(content, path, places | changed)


def apply_changes(content: dict[str, Any], changes: Sequence[str]) -> dict[tuple[str, ...], str]:
    """Apply ``a.b=value`` changes to nested tables in place; the changed keys and their places.

    Raises:
        ConfigError: a change has no such form, or a key of it is a value and no section.
    """
    return {_apply(content, change): f"--set {change}" for change in changes}


def rank_table(path: Path | str, clients: Mapping[str, str]) -> Ranks:
    """The ranks in a TOML file of their own, checked like the config's section ``ranks``.

    ``clients`` (a client's rank type by its name) are added to those of the file, which take
    precedence.

    Raises:
        ConfigError: the file cannot be read, or a key is unknown or has a wrong type.
    """
    content = read_table(path)
    if "table" in content:
        raise ConfigError(f"{path}: a rank table cannot refer to another one; remove 'table'.")
    return parse_ranks({**content, "clients": {**clients, **content.get("clients", {})}}, path)


def read_table(path: Path | str) -> dict[str, Any]:
    """The table ``[ranks]`` of a TOML file, or the whole file if it has none.

    Raises:
        ConfigError: the file is missing or is not TOML.
    """
    _, content = read_toml(_checked_path(path), "rank table")
    return dict(content.get("ranks", content))


def read_toml(path: Path, label: str) -> tuple[str, dict[str, Any]]:
    """The text of a TOML file and its tables; ``label`` is what errors call the file."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except IsADirectoryError as error:
        raise ConfigError(
            f"The {label} {path} cannot be read: it is a folder; name a TOML file."
        ) from error
    except OSError as error:
        written = _WRITTEN_BY.get(label, "")
        remedy = "" if path.exists() else f"; give the path of a TOML file{written}"
        raise ConfigError(
            f"The {label} {path} cannot be read: {error.strerror}{remedy}."
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is not valid TOML: byte {error.start} is not UTF-8; save it as UTF-8 text."
        ) from error
    try:
        return text, tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(_not_toml(path, text, str(error))) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"{path} has a number of thousands of digits, or hundreds of brackets in each other."
        ) from error


def _not_toml(path: Path, text: str, fault: str) -> str:
    """What is wrong with the syntax of a file, with the line that it is in."""
    if path.suffix.lower() in (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".gz"):
        return (
            f"{path} is not valid TOML; if it holds your rows, write a config for them with: "
            f"flexlora init {path}"
        )
    reason, _, place = fault.partition(" (at ")
    number = re.match(r"line (\d+)", place)
    if number is None:
        return f"{path} is not valid TOML: {reason[:1].lower()}{reason[1:]}."
    line = text.splitlines()[int(number[1]) - 1].strip()
    return (
        f"{path}, line {number[1]}, is not valid TOML ({reason[:1].lower()}{reason[1:]}): "
        f"{line[:60]} - texts stand in quotes, those with a backslash in single ones; a section "
        "and a key stand once."
    )


def dump(experiment: Experiment | Mapping[str, Any]) -> str:
    """A config as TOML text, from an experiment or from its JSON form, as a journal has it.

    TOML has no null: keys without a value are left out. For an experiment with absolute paths,
    ``load`` of a file with this text gives an equal experiment. Tables come after the plain keys.
    """
    if isinstance(experiment, Experiment):
        experiment = experiment.model_dump(mode="json")
    return tomli_w.dumps(_without_none(experiment))


def _without_none(table: Mapping[str, Any]) -> dict[str, Any]:
    """The table without the keys whose value is None, at any depth."""
    return {key: _value(value) for key, value in table.items() if value is not None}


def _value(value: Any) -> Any:
    if isinstance(value, Mapping):
        return _without_none(value)
    if isinstance(value, list | tuple):
        return [_value(item) for item in value if item is not None]
    return value


def _checked_path(path: Path | str) -> Path:
    if not isinstance(path, Path | str):
        raise ConfigError(
            f"A TOML file is given by its path, as str or Path, not by {path!r:.60}, a "
            f"{type(path).__name__}; to check tables in memory call parse(content, place)."
        )
    return Path(path)


def lines_of(text: str) -> dict[tuple[str, ...], int]:
    """The line, from 1, of each table and key of a TOML text; a hint for messages only.

    In an array of tables the number of the table, from 0, follows the key of the array. Found by
    pattern, so multi-line strings can give a wrong line.
    """
    table: tuple[str, ...] = ()
    lines: dict[tuple[str, ...], int] = {}
    tables: dict[tuple[str, ...], int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if array := _ARRAY.match(line):
            key = _split_key(array[1])
            tables[key] = tables.get(key, -1) + 1
            table = (*key, str(tables[key]))
            lines.setdefault(table, number)
        elif header := _TABLE.match(line):
            table = _in_array(_split_key(header[1]), tables)
            lines.setdefault(table, number)
        elif key_of_line := _KEY.match(line):
            lines.setdefault((*table, *_split_key(key_of_line[1])), number)
    return lines


def _in_array(key: tuple[str, ...], tables: Mapping[tuple[str, ...], int]) -> tuple[str, ...]:
    """The key of a table; one below an array of tables belongs to the last of them."""
    for end in range(len(key), 0, -1):
        if key[:end] in tables:
            return (*key[:end], str(tables[key[:end]]), *key[end:])
    return key


def _split_key(dotted: str) -> tuple[str, ...]:
    return tuple(part.strip().strip("\"'") for part in dotted.split("."))


def _apply(content: dict[str, Any], change: str) -> tuple[str, ...]:
    """Apply one change ``a.b=value`` in place; returns its key. The value is TOML, or a string."""
    dotted, equals, text = change.partition("=")
    keys = _split_key(dotted)
    if not equals or not all(keys):
        raise ConfigError(f"--set takes KEY=VALUE with a dotted key, not {change!r}.")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        value = text
    table = content
    for key in keys[:-1]:
        table = table.setdefault(key, {})
        if not isinstance(table, dict):
            raise ConfigError(f"--set {change!r}: {key!r} is a value, not a section.")
    table[keys[-1]] = value
    return keys


def make_paths_absolute(
    content: dict[str, Any], folder: Path, changed: Collection[tuple[str, ...]]
) -> None:
    """Resolve ``data.path``, ``ranks.table`` and a template's file in ``data.prompt`` in place.

    They are relative to the config's folder, or to the working folder where a change set them.
    """
    for section, key in (("data", "path"), ("data", "prompt"), ("ranks", "table")):
        table = content.get(section)
        # "" stands for a path that is not there.
        if not isinstance(table, dict) or not isinstance(table.get(key), str) or not table[key]:
            continue
        if key == "path" and table.get("format") == "hub":
            continue
        if key == "prompt" and not table[key].endswith(TEMPLATE_SUFFIXES):
            continue
        is_changed = (section, key) in changed or (section,) in changed
        base = Path.cwd() if is_changed else folder
        if "\0" not in table[key]:  # which ``parse`` refuses
            table[key] = str((base / expanded(table[key], f"{section}.{key}")).resolve())
