"""What several commands share: options, the config stored with a run, and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flexlora.errors import ConfigError

if TYPE_CHECKING:
    from flexlora.config import Experiment

Changes = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a setting, e.g. federation.rounds=3."),
]

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG.toml", help="The config file.")]

RunFolder = Annotated[Path, typer.Argument(metavar="DIR", help="The folder of a run.")]


def refuse_file(folder: Path, option: str) -> None:
    """Refuse a folder that is a file, or lies in one; names ``option``, which sets another."""
    if any(path.exists() and not path.is_dir() for path in (folder, *folder.parents)):
        raise ConfigError(
            f"The folder {folder} cannot be made: it or one of its parents is a file; give "
            f"another {option}."
        )


def make_folder(folder: Path, option: str) -> None:
    """Make a folder and its parents, unless it exists.

    Raises:
        ConfigError: it cannot be made; names ``option``, which sets another.
    """
    refuse_file(folder, option)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"The folder {folder} cannot be made: {error.strerror}; give another {option}."
        ) from error


def stored(folder: Path) -> Experiment:
    """The experiment that the run in ``folder`` was started with.

    Raises:
        ConfigError: the folder holds no run, or its config cannot be read.
    """
    from flexlora.federation import compose

    path = folder / "config.json"
    if not path.exists():
        raise ConfigError(f"There is no run to resume in {folder}: it has no config.json.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(
            f"{path} is not valid JSON ({error}); restore the file, or start a new run."
        ) from error
    return compose.parse(content, str(path))
