"""The command that lists the federated methods."""

from __future__ import annotations

import json
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import flexlora

if TYPE_CHECKING:
    from flexlora.method import Method


def list_methods(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="[NAME]",
            help="Describe this method, with its options.",
            autocompletion=lambda incomplete: completed(incomplete),
        ),
    ] = None,
) -> None:
    """List the federated methods, or describe one with its options."""
    if name is None:
        _table()
    else:
        _describe(name)


LISTED = Path(flexlora.__file__).parent / "methods" / "listed.json"
"""The rows of the library's own methods, which `make docs` writes and a test keeps true.

To ask the methods themselves PyTorch is imported, which takes seconds.
"""


def completed(incomplete: str) -> list[str]:
    """The methods that shells offer after the beginning of a name, or of a list of names."""
    listed, comma, last = incomplete.rpartition(",")
    names = (name for name, *_ in json.loads(LISTED.read_text(encoding="utf-8")))
    return [f"{listed}{comma}{name}" for name in names if name.startswith(last)]


def row(name: str) -> list[str]:
    """A method's row of the list: name, whether it takes mixed ranks and is exact, paper."""
    from flexlora import methods
    from flexlora.method import Feature

    method = methods.make(name)
    mixed = Feature.MIXED_RANKS in method.features
    return [name, _yes(mixed), _exact(method), method.info.paper]


def _table() -> None:
    from rich.console import Console
    from rich.table import Table

    rows = json.loads(LISTED.read_text(encoding="utf-8"))
    shipped = {name for name, *_ in rows}
    installed = {point.name for point in entry_points(group="flexlora.methods")}
    table = Table("name", "mixed ranks", "exact", "paper", box=None, pad_edge=False)
    for listed in sorted([*rows, *map(row, installed - shipped)]):
        table.add_row(*listed)
    Console().print(table, highlight=False, markup=False)
    print()
    print("mixed ranks: clients may have different LoRA ranks.")
    print("exact: the aggregate is the weighted mean of the clients' products B @ A,")
    print("       up to the rank that the server keeps.")
    print("Options of a method: flexlora methods NAME")


def _describe(name: str) -> None:
    import inspect

    from flexlora import methods
    from flexlora.method import Feature

    name = methods.resolve(name)
    method = methods.make(name)
    options, kind = vars(method), type(method)
    print(f"{name}: {method.title} ({method.info.paper})\n")
    print(inspect.getdoc(inspect.getmodule(kind)) or inspect.getdoc(kind))
    print(f"\nmixed ranks:   {_yes(Feature.MIXED_RANKS in method.features)}")
    print(f"mixed modules: {_yes(Feature.PER_MODULE in method.features)}")
    print(f"exact:         {_exact(method)}")
    print("options:       " + (", ".join(f"{k} = {v!r}" for k, v in options.items()) or "none"))


def _exact(method: Method) -> str:
    from flexlora.method import Feature

    if Feature.PERSONAL in method.features:
        return "–"
    return {"exact": "yes", "inexact": "no"}.get(method.info.exactness, method.info.exactness)


def _yes(value: bool) -> str:
    return "yes" if value else "no"
