"""The picture of rank collapse, drawn from the committed figures in ``results/collapse.json``.

    python benchmarks/collapse_figure.py

It needs nothing but the Python standard library. Text and lines are of middle brightness, so that
the picture is legible on a white page and on a dark one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.sax.saxutils import escape

RESULTS = Path(__file__).parent / "results"

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 820, 430, 60, 170, 66, 52
STEP = 5
"""Percent between two grid lines."""
LABEL_HEIGHT = 17
"""The least distance of two labels at the ends of the lines."""

TITLES = {
    "fedplora": "Fed-PLoRA",
    "ffalora": "FFA-LoRA",
    "flexfold": "FlexFold",
    "flexlora": "FlexLoRA",
    "fslora": "FSLoRA",
    "hetlora": "HetLoRA",
    "raflora": "raFLoRA",
    "replication": "replication padding",
}
COLOURS = {
    "raflora": "#c05f1c",
    "fedplora": "#9a5cc6",
    "flexfold": "#1b8577",
    "flexlora": "#3b78c9",
    "hetlora": "#cf4a72",
}
"""Of the methods that the text speaks of; all others are thin and grey."""
GREY = "#777a82"


def svg(percent: Mapping[str, Sequence[float]], levels: Sequence[int]) -> str:
    """The picture: by method the percent of energy in the highest block after each round.

    ``levels`` are the clients' ranks, ascending.
    """
    rounds = max(len(values) for values in percent.values())
    top = STEP * (int(max(map(max, percent.values())) / STEP) + 1)

    def x(number: float) -> float:
        return LEFT + (number - 1) / max(rounds - 1, 1) * (WIDTH - LEFT - RIGHT)

    def y(share: float) -> float:
        return HEIGHT - BOTTOM - share / top * (HEIGHT - TOP - BOTTOM)

    title = f"Energy of the global update in ranks {levels[-2] + 1} to {levels[-1]}"
    ranks = f"{', '.join(map(str, levels[:-1]))} and {levels[-1]}"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'font-family="system-ui, sans-serif" font-size="13" fill="{GREY}">',
        f"<title>{escape(title)}, percent, by round and method</title>",
        _text(LEFT, 22, title, extra='font-size="17" font-weight="600"'),
        _text(LEFT, 43, f"percent of the squared singular values; clients train at ranks {ranks}"),
    ]
    for share in range(0, top + 1, STEP):
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(share):.1f}" y2="{y(share):.1f}" '
            f'stroke="{GREY}" stroke-opacity="0.3"/>'
        )
        parts.append(_text(LEFT - 8, y(share) + 4.5, f"{share} %", "end"))
    parts += [_text(x(n), HEIGHT - BOTTOM + 20, str(n), "middle") for n in range(1, rounds + 1)]
    parts.append(_text(x((rounds + 1) / 2), HEIGHT - 10, "round", "middle"))
    label = float("-inf")
    for name, values in sorted(percent.items(), key=lambda item: -item[1][-1]):
        colour, width = COLOURS.get(name, GREY), 2.5 if name in COLOURS else 1.2
        points = " ".join(f"{x(n):.1f},{y(value):.1f}" for n, value in enumerate(values, 1))
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="{width}" '
            'stroke-linejoin="round"/>'
        )
        label = max(y(values[-1]) + 4.5, label + LABEL_HEIGHT)
        weight = ' font-weight="600"' if name in COLOURS else ""
        text = TITLES.get(name, name)
        parts.append(_text(x(len(values)) + 10, label, text, extra=f'fill="{colour}"{weight}'))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _text(x: float, y: float, text: str, anchor: str = "start", extra: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {extra}>{escape(text)}</text>'


def main() -> None:
    """Write ``results/collapse.svg``."""
    measured = json.loads((RESULTS / "collapse.json").read_text(encoding="utf-8"))["measurements"]
    picture = svg(measured["percent"], measured["levels"])
    (RESULTS / "collapse.svg").write_text(picture, encoding="utf-8")


if __name__ == "__main__":
    main()
