"""What a key of a config may be, in words, from its annotation and its bounds."""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel

_BOUNDS = (("ge", "at least"), ("gt", "above"), ("le", "at most"), ("lt", "below"))


@dataclass(frozen=True)
class Kind:
    """The type of a key: its ``annotation`` and pydantic's ``metadata``, which has the bounds."""

    annotation: Any
    metadata: Sequence[Any] = ()

    def child(self, key: str) -> Kind | None:
        """The type of a key below this one; None if this has no such key."""
        for member in self.members():
            if get_origin(member) is dict:
                return Kind(get_args(member)[1])
            if key in (below := keys_of(member)):
                return below[key]
        return None

    def members(self) -> list[Any]:
        """The types that a value may have, without None."""
        kind, origin = self.annotation, get_origin(self.annotation)
        if origin is Annotated:
            return Kind(get_args(kind)[0]).members()
        if origin in (types.UnionType, Union):
            return [m for one in get_args(kind) for m in Kind(one).members()]
        return [] if kind is types.NoneType else [kind]

    @property
    def may_be_left_out(self) -> bool:
        """Whether None is a value, which in a config is a key that is not there."""
        return type(None) in get_args(self.annotation)

    def choices(self) -> list[str]:
        """The texts that a value may be, if only some may be."""
        return [
            choice
            for member in self.members()
            if get_origin(member) is Literal
            for choice in get_args(member)
            if isinstance(choice, str)
        ]

    def words(self) -> str:
        """What a value may be, such as "a whole number of at least 1"."""
        return " or ".join(dict.fromkeys(self._member(member) for member in self.members()))

    def _member(self, member: Any) -> str:
        origin, inner = get_origin(member), get_args(member)
        if origin is Literal:
            shown = [f'"{c}"' if isinstance(c, str) else str(c).lower() for c in inner]
            return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} or {shown[-1]}"
        if member is bool:
            return "true or false"
        if member in (int, float):
            return self._bounded("a whole number" if member is int else "a number")
        if member is str:
            return "a text in quotes"
        if origin in (tuple, list):
            return f"a list of {_PLURAL.get(inner[0], 'values')}, such as {_EXAMPLE.get(inner[0])}"
        if origin is dict:
            if inner[1] is Any:
                return 'a section, such as { name = "..." }'
            below = Kind(inner[1])
            return f"a table whose values are each {below.words()}"
        if below_keys := keys_of(member):
            return f"a section with the keys {', '.join(below_keys)}"
        return "a value"

    def _bounded(self, noun: str) -> str:
        bounds = " and ".join(
            f"{word} {getattr(each, name):g}"
            for each in self.metadata
            for name, word in _BOUNDS
            if getattr(each, name, None) is not None
        )
        joint = " of " if bounds.startswith("at ") else " "
        return f"{noun}{joint}{bounds}" if bounds else noun


def keys_of(section: Any) -> Mapping[str, Kind]:
    """The keys of a section of a config, in their order; none of anything else."""
    if isinstance(section, type) and issubclass(section, BaseModel):
        return {
            name: Kind(field.annotation, field.metadata)
            for name, field in section.model_fields.items()
        }
    if isinstance(section, type) and is_dataclass(section):
        hints = get_type_hints(section)
        return {field.name: Kind(hints[field.name]) for field in fields(section)}
    return {}


_PLURAL = {str: "texts", int: "whole numbers", float: "numbers"}
_EXAMPLE = {str: '["a", "b"]', int: "[1, 2]", float: "[0.9, 0.99]"}
