"""PEFT's regular expressions for modules: untrusted, so that their cost is bounded."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TypeVar

from flexlora.errors import AdapterError
from flexlora.storage.untrusted import short

_Value = TypeVar("_Value")

_PATTERN_CHARACTERS = 512

_PATTERN_STEPS = 3e10

_STEPS_PER_MATCH = 1000

_TOKEN = re.compile(
    r"(?P<escape>\\\D)|(?P<set>\[\^?[\w.\\-]+\])|(?P<open>\((\?:)?)|(?P<close>\))"
    r"|(?P<repeat>[*+]|\{\d*,?\d*\})|(?P<optional>\?)|(?P<or>\|)|(?P<plain>[\w.^$/:@, -])",
    re.ASCII | re.DOTALL,
)


def matched(
    patterns: Mapping[str, _Value], modules: Sequence[str], place: str
) -> dict[str, list[_Value]]:
    """The values of the patterns that match each module, in the patterns' order.

    PEFT takes the first. Patterns are untrusted regular expressions: their length, their
    constructs and the number of steps that matching them could take at worst are bounded.

    Raises:
        AdapterError: a pattern is invalid, or might take too long; the text begins with ``place``.
    """
    compiled = [
        (_compiled(pattern, rf"(.*\.)?({pattern})$", place), value)
        for pattern, value in patterns.items()
    ]
    dots = max((module.count(".") for module in modules), default=0)
    _refuse_many_steps(list(patterns), modules, dots + 2, place)
    return {
        module: [value for expression, value in compiled if expression.match(module)]
        for module in modules
    }


def whole_matches(pattern: str, modules: Sequence[str], place: str) -> set[str]:
    """The modules whose whole path the pattern matches, as in PEFT's ``target_modules``.

    Raises:
        AdapterError: as for ``matched``.
    """
    expression = _compiled(pattern, pattern, place)
    _refuse_many_steps([pattern], modules, 1, place)
    return {module for module in modules if expression.fullmatch(module)}


def _refuse_many_steps(
    patterns: Sequence[str], modules: Sequence[str], starts: int, place: str
) -> None:
    """Refuse patterns that could take too long; each is tried from ``starts`` positions."""
    longest = max((len(module) for module in modules), default=0)
    steps = sum(_STEPS_PER_MATCH + starts * _ways(pattern, longest) for pattern in patterns)
    if steps * len(modules) > _PATTERN_STEPS:
        raise AdapterError(
            f"{place} could take too long to match its {len(patterns)} patterns with "
            f"{len(modules)} modules; write the modules' names, with fewer * + ? and |."
        )


def _compiled(pattern: str, expression: str, place: str) -> re.Pattern[str]:
    if len(pattern) > _PATTERN_CHARACTERS:
        raise AdapterError(
            f"{place} has a pattern of {len(pattern)} characters, {short(pattern)}; at most "
            f"{_PATTERN_CHARACTERS} are allowed."
        )
    _refuse_constructs(pattern, place)
    try:
        return re.compile(expression)
    except (re.error, OverflowError, RecursionError) as error:
        raise AdapterError(
            f"{place}: {short(pattern)} is not a regular expression ({short(error)}); correct it."
        ) from error


def _tokens(pattern: str) -> list[str]:
    """The kinds of the pattern's tokens; the last is ``""`` if a token is not supported."""
    kinds: list[str] = []
    position = 0
    while position < len(pattern):
        token = _TOKEN.match(pattern, position)
        if token is None or "--" in token[0]:
            return [*kinds, ""]
        kinds.append(str(token.lastgroup))
        position = token.end()
    return kinds


def _refuse_constructs(pattern: str, place: str) -> None:
    kinds = _tokens(pattern)
    pairs = list(pairwise(kinds))
    if "" in kinds or ("open", "optional") in pairs:
        raise AdapterError(
            f"{place}: {short(pattern)} uses more of regular expressions than is supported "
            f"(names, . [sets] | groups and * + ? are, back references and lookaround are "
            f"not); write the modules' names."
        )
    if ("close", "repeat") in pairs:
        raise AdapterError(
            f"{place}: {short(pattern)} repeats a group, which can take for ever to match; "
            f"write the modules' names."
        )


def _ways(pattern: str, characters: int) -> float:
    """A bound on the number of ways in which a pattern can match from one position."""
    kinds = _tokens(pattern)
    pairs = list(pairwise(["", *kinds]))
    optional = sum(pair[1] == "optional" and pair[0] != "repeat" for pair in pairs)
    exponent = kinds.count("repeat") * math.log2(characters + 1) + optional
    branches, groups = 0.0, [1]
    for kind in kinds:
        if kind == "open":
            groups.append(1)
        elif kind == "or":
            groups[-1] += 1
        elif kind == "close" and len(groups) > 1:
            branches += math.log2(groups.pop())
    exponent += branches + sum(math.log2(group) for group in groups)
    return math.exp2(min(exponent, 100))
