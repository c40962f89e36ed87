"""The losses by round as the lines of an SVG figure, which needs no JavaScript."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from flexlora.journal import number
from flexlora.reporting.watch.run_state import RunState

WIDTH, HEIGHT = 1000, 200
"""The figure's own units; the page stretches it, lines keep their width."""

MOST_POINTS = 250
_ROOM = 0.06


@dataclass(frozen=True)
class Line:
    """One line: its name and last value as text, and the SVG paths of its line and its points."""

    name: str
    last: str
    line: str
    points: str


@dataclass(frozen=True)
class Curve:
    """The lines and the ends of both axes; there is nothing to draw if ``top`` is empty."""

    lines: tuple[Line, ...]
    top: str = ""
    bottom: str = ""
    first: str = ""
    last: str = ""


NAMES = ("training", "unseen clients", "seen clients", "clients' own rows")


def loss_curve(now: RunState) -> Curve:
    """The training loss and the evaluated losses by round, always the same lines.

    Of many rounds every n-th is drawn, and the last.
    """
    series = dict(zip(NAMES, (now.losses_by_round, *_evaluated(now)), strict=True))
    rounds = [n for values in series.values() for n in values]
    losses = [loss for values in series.values() for loss in values.values()]
    if not rounds:
        return Curve(tuple(Line(name, "", "", "") for name in NAMES))
    across, up = (min(rounds), max(rounds)), (min(losses), max(losses))
    return Curve(
        tuple(_line(name, values, across, up) for name, values in series.items()),
        top=f"{up[1]:.3f}",
        bottom=f"{up[0]:.3f}",
        first=f"round {across[0]:,}",
        last=f"round {across[1]:,}" if across[1] > across[0] else "",
    )


def _evaluated(now: RunState) -> tuple[Mapping[int, float], ...]:
    return tuple(now.curves.get(group, {}) for group in ("unseen", "seen", "own"))


def _line(
    name: str, values: Mapping[int, float], across: tuple[int, int], up: tuple[float, float]
) -> Line:
    rounds = sorted(values)
    step = len(rounds) // MOST_POINTS + 1
    drawn = [n for i, n in enumerate(rounds) if i % step == 0 or n == rounds[-1]]
    places = [
        (
            _place(n, across, WIDTH),
            HEIGHT - _place(values[n], up, HEIGHT),
        )
        for n in drawn
    ]
    line = " ".join(f"{'L' if i else 'M'}{x:.1f} {y:.1f}" for i, (x, y) in enumerate(places))
    # A line of no length with round ends is a point.
    points = " ".join(f"M{x:.1f} {y:.1f}h0" for x, y in places) if step == 1 else ""
    return Line(name, number(values[rounds[-1]], 3) if rounds else "", line, points)


def _place(value: float, ends: tuple[float, float], length: int) -> float:
    """Where a value between the ends lies, with room at both; in the middle if they are equal."""
    low, high = ends
    share = (value - low) / (high - low) if high > low else 0.5
    return length * (_ROOM + (1 - 2 * _ROOM) * share)
