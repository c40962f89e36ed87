"""The laws on a method: one's own, or one of the library's."""

from __future__ import annotations

import textwrap
import tomllib
from collections.abc import Sequence
from typing import Annotated, Any

import typer


def laws(
    method: Annotated[
        str, typer.Argument(metavar="METHOD", help="A Python file with a method, or a name.")
    ],
    options: Annotated[
        list[str] | None,
        typer.Option("--option", metavar="KEY=VALUE", help="A hyper-parameter of the method."),
    ] = None,
) -> None:
    """Check a federated method against the laws that every method must obey."""
    from flexlora import methods
    from flexlora.laws import verdicts

    made = methods.make(method, _options(options or ()))
    broken = 0
    for verdict in verdicts(made):
        broken += verdict.outcome == "broken"
        text = verdict.reason or verdict.law.statement
        head = f"{verdict.law.name:<15}{verdict.outcome:<16}"
        print(textwrap.fill(text, 79, initial_indent=head, subsequent_indent=" " * 31))
    if broken:
        print(f"{made.title}: {broken} laws are broken.")
        raise typer.Exit(1)
    print(f"{made.title}: no law is broken.")


def _options(texts: Sequence[str]) -> dict[str, Any]:
    """Options from KEY=VALUE, a value as TOML writes it, or else a string."""
    from flexlora.errors import ConfigError

    options: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"--option takes KEY=VALUE, such as keep=0.9, not {text!r}.")
        try:
            options[key.strip()] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            options[key.strip()] = value
    return options
