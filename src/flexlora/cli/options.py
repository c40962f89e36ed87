"""What several commands share: options, the config stored with a run, and refusals."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flexlora.errors import ConfigError
from flexlora.storage import LOCK, is_lock_file, locked

if TYPE_CHECKING:
    from flexlora.config import Experiment

Changes = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a setting, e.g. federation.rounds=3."),
]

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG.toml", help="The config file.")]

RunFolder = Annotated[
    Path | None,
    typer.Argument(
        metavar="[DIR]", help="The folder of a run; default: the last in runs.", show_default=False
    ),
]

RUNS = Path("runs")
"""Where runs are written, unless they are told otherwise."""

_MARKS = ("metrics.jsonl", "config.json", "checkpoint.json")
"""Files of which a run's folder has at least one."""


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a run."""
    return any((folder / name).is_file() for name in _MARKS)


def last_run(use: str) -> Path:
    """The most recently changed run under ``runs``; says on stderr which one it is, and for what.

    Raises:
        ConfigError: there is none.
    """
    found = {path.parent for name in _MARKS for path in RUNS.rglob(name) if path.is_file()}
    if not found:
        raise ConfigError(
            f"There is no run in {RUNS.resolve()}; give the folder of a run to {use}."
        )
    newest = max(found, key=_changed)
    print(f"{use}: {newest}, the last run", file=sys.stderr)
    return newest


def with_last_run(words: Sequence[str]) -> list[str]:
    """The words of a command line, with the last run behind a ``run --resume`` that names none."""
    place = words.index("--resume") + 1 if words[:1] == ["run"] and "--resume" in words else 0
    if not place or (place < len(words) and not words[place].startswith("-")):
        return list(words)
    return [*words[:place], str(last_run("resume")), *words[place:]]


def _changed(folder: Path) -> float:
    return max((folder / name).stat().st_mtime for name in _MARKS if (folder / name).is_file())


def run_folder(folder: Path | None, use: str) -> Path:
    """The folder of a run: the one that was given, or that of the last run.

    Raises:
        ConfigError: it holds no run.
    """
    if folder is None:
        return last_run(use)
    if not is_run(folder):
        raise ConfigError(f"There is no run in {folder}: it has none of {', '.join(_MARKS)}.")
    return folder


def refuse_file(folder: Path, option: str) -> None:
    """Refuse a folder that is a file, or lies in one; names ``option``, which sets another."""
    if any(path.exists() and not path.is_dir() for path in (folder, *folder.parents)):
        raise ConfigError(
            f"The folder {folder} cannot be made: it or one of its parents is a file; give "
            f"another {option}."
        )


@contextmanager
def alone_in(
    folder: Path, option: str, name: str = LOCK, refusal: str | None = None
) -> Iterator[None]:
    """Make a folder, unless it exists, and keep other processes out of it.

    One that is made is its owner's alone, and is removed again if nothing was written into it.

    Raises:
        ConfigError: it cannot be made; names ``option``, which sets another.
        ProtocolError: another process is in it.
    """
    refuse_file(folder, option)
    is_new = not folder.exists()
    make_folder(folder.parent, option)
    make_folder(folder, option, mode=0o700)
    with locked(folder, name, refusal):
        try:
            yield
        finally:
            files = list(folder.iterdir()) if is_new and folder.is_dir() else []
            if files and all(is_lock_file(file) for file in files):
                shutil.rmtree(folder, ignore_errors=True)


def make_folder(folder: Path, option: str, mode: int = 0o777) -> None:
    """Make a folder and its parents, unless it exists; ``mode`` is its own, before the umask.

    Raises:
        ConfigError: it cannot be made; names ``option``, which sets another.
    """
    refuse_file(folder, option)
    try:
        folder.mkdir(mode=mode, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"The folder {folder} cannot be made: {error.strerror}; give another {option}."
        ) from error


def last_adapter(folder: Path) -> Path:
    """The adapter of the last round that the run in ``folder`` has finished.

    Raises:
        ConfigError: it has none.
    """
    adapters = sorted(folder.glob("rounds/*/adapter/adapter_config.json"))
    if not adapters:
        raise ConfigError(
            f"The run in {folder} has no adapter: no round of it has finished. Resume it with: "
            f"flexlora run --resume {folder}"
        )
    return adapters[-1].parent


def finished_rounds(folder: Path) -> int:
    """How many rounds the run in ``folder`` has finished with; 0 if it has not finished.

    Also 0 if its journal is damaged, of which a run that is resumed keeps what can be read.
    """
    from flexlora.journal import Record
    from flexlora.storage import DamagedFile

    try:
        return max((event["rounds"] for event in Record(folder).events("finish")), default=0)
    except DamagedFile:
        return 0


def stored(folder: Path, changes: Sequence[str] = ()) -> Experiment:
    """The experiment that the run in ``folder`` was started with, and ``changes`` to it.

    Raises:
        ConfigError: the folder holds no run, or its config cannot be read.
    """
    from flexlora.federation import compose

    return compose.stored(folder, changes)
