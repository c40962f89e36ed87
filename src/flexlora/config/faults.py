"""What pydantic found wrong with a config, as sentences with the place and a remedy."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from flexlora.config.kinds import Kind, keys_of
from flexlora.errors import FlexloraError

Places = Mapping[tuple[str, ...], str]
"""Where each key was given, by the parts of the dotted key: a line of a file, or ``--set``."""

_LONGEST, _DEEPEST, _ITEM = 80, 12, "[]"


def sentences(root: type, error: ValidationError, place: str, places: Places) -> list[str]:
    """A sentence for each key that is wrong, each once; ``place`` is where the others are."""
    faults = list(_located(root, error))
    # Of a value that may be of several types, the fault that lies deepest is the one to mend.
    deepest = [
        (path, kind, fault)
        for path, kind, fault in faults
        if not any(len(other) > len(path) and other[: len(path)] == path for other, _, _ in faults)
    ]
    absent = [path[0] for path, _, fault in deepest if len(path) == 1 and _is_missing(fault)]
    first = []
    if len(absent) > 1:
        names = ", ".join(f"[{name}]" for name in absent)
        first = [f"{place}: the sections {names} are missing; flexlora init writes a whole config."]
        deepest = [each for each in deepest if each[0] not in [(name,) for name in absent]]
    by_key = {(path, _is_missing(fault)): (path, kind, fault) for path, kind, fault in deepest}
    return first + [
        _placed(path, _sentence(path, kind, fault), place, places)
        for path, kind, fault in by_key.values()
    ]


def unusable(content: Mapping[str, Any], place: str, places: Places) -> Iterator[str]:
    """A sentence for each value that TOML can hold and no key of a config can be.

    These are infinite numbers and NaN, integers of more than 64 bits, texts with a null
    character, and tables in tables in tables without end.
    """
    for path, value in _values(content, ()):
        if isinstance(value, float) and not math.isfinite(value):
            sentence = "give a finite number"
        elif isinstance(value, int) and abs(value) >= 2**63:
            sentence = "give a number of at most 18 digits"
        elif isinstance(value, str) and "\0" in value:
            sentence = "give a text without the null character"
        elif len(path) > _DEEPEST:
            sentence = f"give a value that is at most {_DEEPEST} tables deep"
        else:
            continue
        key = ".".join(part for part in path if part != _ITEM)[:_LONGEST]
        yield _placed(path, f"{key!r} is {shown(value)}; {sentence}.", place, places)


def _values(value: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Each key, plain value and item of a list below ``path``; deeper ones are left out."""
    below = value if isinstance(value, Mapping) else {}
    items = value if isinstance(value, list | tuple) else ()
    if len(path) > _DEEPEST or not (below or items):
        yield path, value
        return
    for key, each in below.items():
        yield path, key
        yield from _values(each, (*path, str(key)))
    for item in items:
        # The path grows with each list, so that lists in lists end too.
        yield from _values(item, (*path, _ITEM))


def of_option(cls: type, error: ValidationError) -> str:
    """What is wrong with a plug-in's first wrong option: "option 'keep' is 3; give ..."."""
    path, kind, fault = next(_located(cls, error))
    sentence = _sentence(path, kind, fault)
    return f"option {sentence}" if path else sentence


def shown(value: object) -> str:
    """A value as a config writes it, shortened."""
    text = {True: "true", False: "false"}.get(value) if isinstance(value, bool) else None
    text = repr(value) if text is None else text
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _is_missing(fault: Any) -> bool:
    return fault["type"] in ("missing", "missing_argument")


def _located(root: type, error: ValidationError) -> Iterator[tuple[tuple[str, ...], Kind, Any]]:
    """Each fault with the key that it is about and the type of that key."""
    for fault in error.errors():
        path: tuple[str, ...] = ()
        kind, parts = Kind(root), [str(part) for part in fault["loc"]]
        while parts:
            several = len(kind.members()) > 1 and not kind.choices()
            # Pydantic names the type that it tried before the keys below it.
            below = parts[1:] if several else parts
            if not below or (child := kind.child(below[0])) is None:
                break
            path, kind, parts = (*path, below[0]), child, below[1:]
        if fault["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            path = (*path, str(fault["loc"][-1]))
        yield path, kind, fault


def _sentence(path: tuple[str, ...], kind: Kind, fault: Any) -> str:
    key = ".".join(path)
    if fault["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        valid = [name for member in kind.members() for name in keys_of(member)]
        near = difflib.get_close_matches(path[-1], valid, 1, 0.5)
        hint = f" Did you mean {'.'.join((*path[:-1], near[0]))!r}?" if near else ""
        return f"unknown key {key!r}.{hint} Valid keys: {', '.join(valid)}."
    if _is_missing(fault):
        return f"{key!r} is missing; give {kind.words()}."
    cause = fault.get("ctx", {}).get("error")
    if isinstance(cause, FlexloraError):
        return str(cause)
    value = fault["input"]
    near = difflib.get_close_matches(str(value), kind.choices(), 1)
    hint = f' Did you mean "{near[0]}"?' if near else ""
    out = ", or leave it out" if kind.may_be_left_out else ""
    return f"{key!r} is {shown(value)}; give {kind.words()}{out}.{hint}"


def _placed(path: tuple[str, ...], sentence: str, place: str, places: Places) -> str:
    """The sentence behind the place of the key, or else of the section that it is in."""
    # A section that checks itself names the key in its sentence.
    named = [key for key in places if key[: len(path)] == path and ".".join(key) in sentence]
    named.sort(key=len, reverse=True)
    above = (path[:n] for n in range(len(path), 0, -1))
    where = next((places[key] for key in (*named, *above) if key in places), place)
    return f"{where}: {sentence}"
