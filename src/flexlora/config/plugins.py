"""Kinds of a thing: one file each in a folder, whose name is the kind's in configs."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import json
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Generic, TypeVar

from pydantic import TypeAdapter, ValidationError

from flexlora.errors import ConfigError

T = TypeVar("T")


@dataclass(frozen=True)
class PluginFolder(Generic[T]):
    """The kinds of ``thing`` that stand in ``folder``; each file has one frozen dataclass of it.

    ``called`` is what errors call them: "server optimizer".
    """

    folder: ModuleType
    thing: type[T]
    called: str

    def names(self) -> list[str]:
        """Every kind's name, sorted: the files of the folder."""
        return sorted(info.name for info in pkgutil.iter_modules(self.folder.__path__))

    def kind(self, name: str) -> type[T]:
        """The class of the kind called ``name``.

        Raises:
            ConfigError: there is no such kind.
        """
        if name not in self.names():
            raise ConfigError(
                f"There is no {self.called} {name!r}.{_nearest(name, self.names())} "
                f"There are: {', '.join(self.names())}."
            )
        module = importlib.import_module(f"{self.folder.__name__}.{name}")
        return next(
            item
            for item in vars(module).values()
            if isinstance(item, type)
            and issubclass(item, self.thing)
            and item.__module__ == module.__name__
        )

    def make(self, section: Mapping[str, Any]) -> T:
        """The kind that a config's section says: its ``name`` and its options.

        Raises:
            ConfigError: the name is missing, or it or one of the options is unknown.
        """
        if "name" not in section:
            raise ConfigError(
                f"The {self.called}'s 'name' is missing; it is one of {', '.join(self.names())}."
            )
        name = str(section["name"])
        options = {key: value for key, value in section.items() if key != "name"}
        cls = self.kind(name)
        fields = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
        for option in options:
            if option not in fields:
                raise ConfigError(
                    f"The {self.called} {name!r} has no option {option!r}."
                    f"{_nearest(option, fields)} It has: {', '.join(fields) or 'none'}."
                )
        try:
            return TypeAdapter(cls).validate_json(json.dumps(options), strict=True)
        except ValidationError as error:
            fault = error.errors()[0]
            option = ".".join(str(part) for part in fault["loc"]) or "options"
            raise ConfigError(
                f"The {self.called} {name!r}, option {option!r} is {fault['input']!r}: "
                f"{fault['msg']}."
            ) from error


def _nearest(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, 1)
    return f" Did you mean {near[0]!r}?" if near else ""
