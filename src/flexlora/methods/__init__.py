"""The methods, one file each; the file's name is the name in configs and on the command line."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import json
import pkgutil
from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError

from flexlora.errors import ConfigError
from flexlora.method import Method


def names() -> list[str]:
    """Every method's name, sorted: the files of this folder."""
    return sorted(info.name for info in pkgutil.iter_modules(__path__))


def kind(name: str) -> type[Method]:
    """The class of the method called ``name``.

    Raises:
        ConfigError: there is no such method.
    """
    if name not in names():
        near = difflib.get_close_matches(name, names(), 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(
            f"There is no method {name!r}.{hint} The methods are: {', '.join(names())}."
        )
    module = importlib.import_module(f"{__name__}.{name}")
    found: list[type[Method]] = [
        item
        for item in vars(module).values()
        if isinstance(item, type)
        and issubclass(item, Method)
        and item.__module__ == module.__name__
    ]
    return found[0]


def make(name: str, options: Mapping[str, Any] | None = None) -> Method:
    """The method called ``name`` with these hyper-parameters.

    Raises:
        ConfigError: the method or one of its options is unknown.
    """
    cls, options = kind(name), dict(options or {})
    fields = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for option in options:
        if option not in fields:
            near = difflib.get_close_matches(option, fields, 1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ConfigError(
                f"Method {name!r} has no option {option!r}.{hint} "
                f"It has: {', '.join(fields) or 'none'}."
            )
    try:
        made: Method = TypeAdapter(cls).validate_json(json.dumps(options), strict=True)
    except ValidationError as error:
        fault = error.errors()[0]
        option = ".".join(str(part) for part in fault["loc"]) or "options"
        raise ConfigError(
            f"Method {name!r}, option {option!r} is {fault['input']!r}: {fault['msg']}."
        ) from error
    return made
