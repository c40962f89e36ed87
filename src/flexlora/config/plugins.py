"""Plug-ins by name: those that ship with the library, installed ones, and one's own file."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import importlib
import importlib.util
import inspect
import json
import pkgutil
import re
import sys
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, Generic, TypeVar

from pydantic import TypeAdapter, ValidationError

from flexlora.config import faults
from flexlora.errors import ConfigError
from flexlora.storage import expanded

T = TypeVar("T")


@dataclass(frozen=True)
class Plugins(Generic[T]):
    """The plug-ins of one kind: classes derived from ``base``, frozen dataclasses of options.

    Those of the library lie in ``folder``, one per file, and are called by the file's name.
    Other packages add theirs by an entry point of the ``group``, whose name is the plug-in's and
    whose value names the class. A path that ends in ``.py`` names a file with one such class.
    ``label`` is what errors call them: "server optimizer".
    """

    folder: ModuleType
    base: type[T]
    label: str
    group: str

    def names(self) -> list[str]:
        """The names of all plug-ins, sorted: the library's and the installed ones."""
        return sorted({*self.shipped(), *self._installed()})

    def shipped(self) -> list[str]:
        """The names of those that ship with the library, sorted."""
        return sorted(info.name for info in pkgutil.iter_modules(self.folder.__path__))

    def resolve(self, name: str, files: bool = True) -> str:
        """The name as ``names`` lists it: ``FlexLoRA`` is flexlora, ``LoRA-A2`` is loraa2.

        Case, hyphens, underscores and blanks do not count. The path of a Python file is returned
        as it is; without ``files`` it is no name: where another machine chooses the name, it must
        not choose which file is run.

        Raises:
            ConfigError: there is no such plug-in; names the nearest one, and all that there are.
        """
        if (files and name.endswith(".py")) or name in self.names():
            return name
        spelled = {_letters(known): known for known in self.names()}
        if _letters(name) in spelled:
            return spelled[_letters(name)]
        raise ConfigError(
            f"There is no {self.label} {name!r}.{_nearest(name, self.names())} "
            f"There are: {', '.join(self.names())}."
        )

    def kind(self, name: str, files: bool = True) -> type[T]:
        """The class of the plug-in called ``name``, in any spelling that ``resolve`` accepts.

        Raises:
            ConfigError: there is no such plug-in, or it is none of this kind.
        """
        name = self.resolve(name, files)
        if files and name.endswith(".py"):
            return self._in_module(_module_of(Path(name)), name)
        if name in self.shipped():
            return self._in_module(importlib.import_module(f"{self.folder.__name__}.{name}"), name)
        return self._loaded(self._installed()[name])

    def make(self, section: Mapping[str, Any], files: bool = True) -> T:
        """The plug-in that a config's section describes: its ``name`` and its options.

        Raises:
            ConfigError: the name is missing, or it or one of the options is unknown.
        """
        if "name" not in section:
            raise ConfigError(
                f"'{self.label.replace(' ', '_')}.name' is missing; it is one of "
                f"{', '.join(self.names())}."
            )
        name = str(section["name"])
        options = {key: value for key, value in section.items() if key != "name"}
        cls = self.kind(name, files)
        if not dataclasses.is_dataclass(cls):
            raise ConfigError(
                f"The {self.label} {cls.__name__} of {name} is no dataclass; decorate it with "
                "@dataclass(frozen=True)."
            )
        fields = [f.name for f in dataclasses.fields(cls)]
        for option in options:
            if option not in fields:
                raise ConfigError(
                    f"The {self.label} {name!r} has no option {option!r}."
                    f"{_nearest(option, fields)} It has: {', '.join(fields) or 'none'}."
                )
        try:
            return TypeAdapter(cls).validate_json(json.dumps(options), strict=True)
        except ValidationError as error:
            raise ConfigError(
                f"The {self.label} {name!r}, {faults.of_option(cls, error)}"
            ) from error

    def is_defined_in(self, path: Path) -> bool:
        """Whether the file has a plug-in of this kind."""
        return bool(self._classes(_module_of(path)))

    def _installed(self) -> dict[str, EntryPoint]:
        return {point.name: point for point in entry_points(group=self.group)}

    def _loaded(self, point: EntryPoint) -> type[T]:
        cls = point.load()
        if not (isinstance(cls, type) and issubclass(cls, self.base)):
            raise ConfigError(
                f"The entry point {point.name!r} = {point.value!r} of the group {self.group!r} is "
                f"no {self.label}; it must name a class derived from {self.base.__name__}."
            )
        return self._usable(cls, point.value)

    def _in_module(self, module: ModuleType, name: str) -> type[T]:
        classes = self._classes(module)
        if len(classes) != 1:
            titles = ", ".join(cls.__name__ for cls in classes) or "none"
            raise ConfigError(
                f"{name} must define one class derived from {self.base.__name__}; it has: {titles}."
            )
        return self._usable(classes[0], name)

    def _classes(self, module: ModuleType) -> list[type[T]]:
        return [
            item
            for item in vars(module).values()
            if isinstance(item, type)
            and issubclass(item, self.base)
            and item.__module__ == module.__name__
            and not item.__name__.startswith("_")
        ][:2]

    def _usable(self, cls: type[T], place: str) -> type[T]:
        if inspect.isabstract(cls):
            missing = ", ".join(sorted(getattr(cls, "__abstractmethods__")))  # noqa: B009
            raise ConfigError(f"The {self.label} {cls.__name__} of {place} must define: {missing}.")
        return cls


def _module_of(path: Path) -> ModuleType:
    """The module in a file of its own, run once; its name follows from the whole path."""
    path = expanded(path, "The plug-in").resolve()
    name = f"flexlora_plugin_{hashlib.sha256(str(path).encode()).hexdigest()[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    if path.suffix != ".py" or not path.is_file():
        raise ConfigError(
            f"There is no Python file {path}; name a .py file that defines the plug-in."
        )
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ConfigError(
            f"{path}{_line_of(error, path)} cannot be imported: {type(error).__name__}: "
            f"{error.msg if isinstance(error, SyntaxError) else error}. Correct the file."
        ) from error
    return module


def _line_of(error: Exception, path: Path) -> str:
    """The last line of a file that was run before an error, for messages."""
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return f", line {error.lineno},"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == str(path)]
    return f", line {lines[-1]}," if lines else ""


def _letters(name: str) -> str:
    """What of a name counts when it is looked up."""
    return re.sub(r"[-_\s]", "", name.casefold())


def _nearest(word: str, names: list[str]) -> str:
    near = difflib.get_close_matches(_letters(word), names, 1)
    return f" Did you mean {near[0]!r}?" if near else ""
