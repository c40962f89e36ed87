"""The command that lists the federated methods."""

from __future__ import annotations

from typing import Annotated

import typer


def list_methods(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="Describe this method, with its options.")
    ] = None,
) -> None:
    """List the federated methods, or describe one with its options."""
    if name is None:
        _table()
    else:
        _describe(name)


def _table() -> None:
    from rich.console import Console
    from rich.table import Table

    from flexlora import methods

    table = Table("name", "mixed ranks", "exact", "paper", box=None, pad_edge=False)
    for name in methods.names():
        kind = methods.kind(name)
        table.add_row(name, _yes(kind.mixed_ranks), _exact(name), kind.paper)
    Console().print(table, highlight=False, markup=False)
    print()
    print("mixed ranks: clients may have different LoRA ranks.")
    print("exact: the aggregate is the weighted mean of the clients' products B @ A,")
    print("       up to the rank that the server keeps.")
    print("Options of a method: flexlora methods NAME")


def _describe(name: str) -> None:
    import inspect

    from flexlora import methods

    kind, options = methods.kind(name), vars(methods.make(name))
    print(f"{name}: {kind.title} ({kind.paper})\n")
    print(inspect.getdoc(inspect.getmodule(kind)) or inspect.getdoc(kind))
    print(f"\nmixed ranks:   {_yes(kind.mixed_ranks)}")
    print(f"mixed modules: {_yes(kind.by_module)}")
    print(f"exact:         {_exact(name)}")
    print("options:       " + (", ".join(f"{k} = {v!r}" for k, v in options.items()) or "none"))


def _exact(name: str) -> str:
    from flexlora import methods

    kind = methods.kind(name)
    if kind.personal:
        return "–"
    return "no" if not kind.exact else "term by term" if kind.rank_wise else "yes"


def _yes(value: bool) -> str:
    return "yes" if value else "no"
