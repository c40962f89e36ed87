"""Where commands write: never over what they have not written themselves, or into parts of a run.

The one rule of every option that names an output.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Collection
from pathlib import Path
from typing import Any, Final

from flexlora.cli.options import is_run, make_folder, refuse_file
from flexlora.errors import ConfigError

_RUN_FOLDERS: Final = re.compile(
    r"rounds|private|flower|tensorboard|mlflow|wandb|(state|uploads)-\d+"
)
"""Folders of a run: nothing but the run writes there."""

_RUN_FILES: Final = frozenset(
    {
        *("metrics.jsonl", "config.json", "checkpoint.json", "answers.jsonl", "report.html"),
        *("serve.json", "clients.json", "nodes.json", "node_keys.json", "delivered.json"),
        *("certificates.json", "arrivals.log", "reply_bytes", "serve.pid", "serverapp.pid"),
    }
)
"""Files of a run, whether they are there yet or not."""

_MOST_BYTES: Final = 2**28
"""The largest file that is read to find out who has written it."""


def output_file(file: Path, option: str, keys: Collection[str]) -> None:
    """Make the folder of a file to be written: JSON, or lines of it, whose objects have ``keys``.

    Raises:
        ConfigError: it is a folder, a file that something else has written, or a part of a run.
    """
    if file.is_dir():
        raise ConfigError(f"{file} is a folder; give {option} the name of a file.")
    refuse_parts_of_runs(file, option)
    if file.exists() and not _is_own(file, keys):
        raise ConfigError(
            f"{file} exists, and this command has not written it; give {option} a new file: "
            f"{_new(option, file.parent, file)}"
        )
    make_folder(file.resolve().parent, option)


def refuse_parts_of_runs(path: Path, option: str) -> None:
    """Refuse an output in the place of a file of a run, or in one of its own folders.

    Raises:
        ConfigError: names a place that is free.
    """
    # The name itself, and what a link of that name leads to.
    for whole in {path.parent.resolve() / path.name, path.resolve()}:
        for run in filter(is_run, whole.parents):
            first, *deeper = (part.lower() for part in whole.relative_to(run).parts)
            is_file = first in _RUN_FILES or first.startswith(".") or first.endswith(".lock")
            if _RUN_FOLDERS.fullmatch(first) or (is_file and not deeper):
                raise ConfigError(
                    f"{path} is a part of the run in {run}, which only the run writes; give "
                    f"another {option}: {_new(option, run, path)}"
                )


def refuse_foreign_config(folder: Path, option: str) -> None:
    """Refuse a folder for a new run that has a config.json of another program, as models have.

    Raises:
        ConfigError: it has one.
    """
    from flexlora.federation import compose
    from flexlora.storage import DamagedFile, read_sealed

    try:
        read_sealed(folder / compose.CONFIG)
    except (FileNotFoundError, NotADirectoryError):
        return
    except DamagedFile as error:
        raise ConfigError(
            f"{folder / compose.CONFIG} is no config of a run, and a run would replace it; give "
            f"{option} a new folder: {_new(option, folder, Path('run'))}"
        ) from error


def output_folder(folder: Path, option: str, names: Collection[str], what: str) -> None:
    """Refuse a folder that is a part of a run, or holds others than these names.

    ``what`` is in words what has these. Unfinished files start with a dot.

    Raises:
        ConfigError: with the remedy.
    """
    refuse_file(folder, option)
    refuse_parts_of_runs(folder, option)
    present = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if others := sorted(name for name in present - {*names} if not name.startswith(".")):
        raise ConfigError(
            f"{folder} holds something else than {what} ({', '.join(others[:3])}); give another "
            f"{option}."
        )


def _new(option: str, folder: Path, path: Path) -> str:
    """The option with a name in a folder that is free."""
    stem, suffix = path.stem.lstrip(".") or "output", path.suffix.replace(".lock", "")
    names = (f"{stem}-{number}{suffix}" for number in range(2, 10_000))
    free = next(folder / name for name in names if not (folder / name).exists())
    name = shlex.quote(str(free))
    return f"{option} {name}" if option.startswith("--") else name


def _is_own(file: Path, keys: Collection[str]) -> bool:
    """Whether a file has nothing but JSON objects with these keys, in a list or in lines."""
    if not file.is_file() or file.stat().st_size > _MOST_BYTES:
        return False
    text = file.read_bytes()
    try:
        if text.startswith(b"["):
            found: list[Any] = json.loads(text)
        else:
            found = [json.loads(line) for line in text.splitlines()]
    except (ValueError, RecursionError):
        return False
    return all(isinstance(each, dict) and each.keys() == set(keys) for each in found)
