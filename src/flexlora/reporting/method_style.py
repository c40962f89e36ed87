"""How a method looks in every figure: a colour, a dash and a marker, by its name alone."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

COLOURS = (
    "#4a7fc1",
    "#d2722a",
    "#3f9c8c",
    "#a06cc4",
    "#c2578a",
    "#8f8a2c",
    "#6f7782",
    "#b04a3c",
)
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
SYMBOLS = ("circle", "diamond", "square", "triangle-up", "cross", "x")
LIBRARY = (
    ("flexlora", "fedit", "flora", "hetlora", "flexfold", "ffalora", "replication", "slora"),
    ("fedsvd", "rolora", "raflora", "florist", "fedexlora", "lorafair", "fullrank", "loraa2"),
    ("fslora", "flasc", "ravan", "fedsalora", "fedtt", "fedplora", "fedrotlora", "florana"),
)
"""The methods of this library, by dash and then by colour. New ones are added where there is room,
so that a method never changes its look."""


@dataclass(frozen=True)
class MethodStyle:
    """A colour, a dash of lines and a symbol of points, as plotly names them."""

    colour: str
    dash: str
    symbol: str


def method_style(name: str) -> MethodStyle:
    """The look of a method; one of no library shares the last dash with others of its kind."""
    for row, names in enumerate(LIBRARY):
        if name in names:
            return MethodStyle(COLOURS[names.index(name)], DASHES[row], SYMBOLS[row])
    place = hashlib.sha256(name.encode(errors="replace")).digest()[0] % len(COLOURS)
    own = len(LIBRARY)
    return MethodStyle(COLOURS[place], DASHES[own], SYMBOLS[own])


def variant_style(name: str, place: int, alone: bool) -> MethodStyle:
    """The look of a method with the variant of a config in this place, from 0.

    It has the method's colour, or, if the method stands ``alone``, a colour for each variant.
    """
    colour = COLOURS[place % len(COLOURS)] if alone else method_style(name).colour
    return MethodStyle(colour, DASHES[place % len(DASHES)], SYMBOLS[place % len(SYMBOLS)])
