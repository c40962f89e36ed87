"""The configs that are shipped with the library: their list, and copies of them."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Annotated

import typer

from flexlora.cli.options import refuse_file
from flexlora.cli.outputs import refuse_parts_of_runs
from flexlora.errors import ConfigError

QUICKSTART = "quickstart"
"""The config that needs no data."""


def list_configs(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="[NAME]",
            help="Copy this config.",
            show_default=False,
            autocompletion=lambda incomplete: [n for n in names() if n.startswith(incomplete)],
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where to copy it; default: NAME.toml.")
    ] = None,
) -> None:
    """List the configs that are included, or copy one into the working directory."""
    if name is None:
        if out is not None:
            raise ConfigError("--out is for a copy: name the config, e.g. flexlora configs smoke.")
        _print_list()
        return
    print(f"written: {copy(name, out)}")


def names() -> list[str]:
    """The names of the shipped configs, sorted."""
    return sorted(path.stem for path in _folder().glob("*.toml"))


def copy(name: str, out: Path | None = None) -> Path:
    """Copy a shipped config to ``out``, by default NAME.toml in the working directory.

    Raises:
        ConfigError: there is no such config, or the file exists.
    """
    name = name.removesuffix(".toml").lower()
    if name not in names():
        near = difflib.get_close_matches(name, names(), 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"There is no config {name!r}.{hint} There are: {', '.join(names())}.")
    target = out or Path(f"{name}.toml")
    write_new(target, (_folder() / f"{name}.toml").read_text(encoding="utf-8"))
    return target


def refuse_missing(path: Path) -> None:
    """Refuse a config that is not there but is included in the library, with how to copy it.

    Raises:
        ConfigError: it is one of those.
    """
    if not path.exists() and path.stem.lower() in names():
        raise ConfigError(
            f"There is no file {path}; the config is included in flexlora, copy it with: "
            f"flexlora configs {path.stem.lower()}"
        )


def refuse_existing(path: Path) -> None:
    """Refuse a file that exists, and a folder in its place.

    Raises:
        ConfigError: it exists.
    """
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; give --out the name of a file.")
    if path.exists():
        raise ConfigError(f"{path} exists already; give --out the name of a new file.")


def write_new(path: Path, text: str) -> None:
    """Write a config that is not there yet, and the folders above it.

    Raises:
        ConfigError: it exists, or it cannot be written.
    """
    refuse_existing(path)
    refuse_parts_of_runs(path, "--out")
    refuse_file(path.parent, "--out")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written: {error.strerror}; give another --out."
        ) from error


def summary(text: str) -> str:
    """What a config is for: the first sentence of its first comment."""
    comment = " ".join(line.lstrip("# ") for line in re.match(r"(#.*\n)*", text)[0].splitlines())  # type: ignore[index]
    return comment.partition(". ")[0].rstrip(".")


def _print_list() -> None:
    import textwrap

    width = max(map(len, names())) + 2
    for name in names():
        text = summary((_folder() / f"{name}.toml").read_text(encoding="utf-8"))
        print(
            textwrap.fill(
                text, 79, initial_indent=f"{name:<{width}}", subsequent_indent=" " * width
            )
        )
    print("\nCopy one into the working directory: flexlora configs NAME")


def _folder() -> Path:
    """Where the shipped configs are: inside the installed package, or in a checkout."""
    installed = Path(__file__).parents[1] / "configs"
    return installed if installed.is_dir() else Path(__file__).parents[3] / "configs"
