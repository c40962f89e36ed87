"""Rank collapse in real training: the energy in the highest block of ranks, round by round.

Reads the journals of ``flexlora compare configs/compare.toml`` (24 clients of ranks 8 to 64 on
Natural Instructions, ten rounds), and plots for the global adapter the share of its energy in
the ranks that only the largest clients have, averaged over the modules.

    flexlora compare configs/compare.toml --methods flexlora,flexfold,raflora --output runs/compare
    python benchmarks/collapse.py runs/compare
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import result

from flexlora.journal.record import Record

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 780, 400, 58, 170, 20, 46
COLOURS = ("#d2722a", "#4a7fc1", "#3f9c8c", "#a06cc4", "#c2578a", "#8f8a2c", "#5f8f3e", "#7d7f86")
OURS, THEIRS = "flexfold", "flexlora"


def curves(folders: Sequence[Path]) -> dict[str, list[float]]:
    """For each method the percentage of energy in the highest block after each round, all seeds."""
    found: dict[str, list[list[float]]] = {}
    for folder in folders:
        for journal in sorted(folder.glob("cells/*/seed-*")):
            record = Record(journal)
            if not any(record.events("finish")):
                continue
            rounds = [
                100 * statistics.mean(blocks[-2] for blocks in event["energy"].values())
                for event in record.events("spectrum")
            ]
            found.setdefault(label(record, journal.parent.name), []).append(rounds)
    return {
        name: [statistics.mean(at) for at in zip(*seeds, strict=True)]
        for name, seeds in sorted(found.items())
    }


def label(record: Record, method: str) -> str:
    """The method's name with the options of its config."""
    config = next(record.events("start"))["config"]["method"]
    options = [f"{key}={value}" for key, value in config.items() if key != "name"]
    return f"{method} ({', '.join(options)})" if options else method


def levels(folders: Sequence[Path]) -> list[int]:
    """The rank levels of the runs."""
    journal = next(path for folder in folders for path in folder.glob("cells/*/seed-*"))
    found: list[int] = next(Record(journal).events("spectrum"))["rank_levels"]
    return found


def svg(found: Mapping[str, Sequence[float]], title: str) -> str:
    """The curves as a picture that needs nothing else; names stand at the ends."""
    rounds = max(len(values) for values in found.values())
    most = 5 * (int(max(max(values) for values in found.values()) / 5) + 1)

    def x(number: float) -> float:
        return LEFT + (number - 1) / max(rounds - 1, 1) * (WIDTH - LEFT - RIGHT)

    def y(share: float) -> float:
        return HEIGHT - BOTTOM - share / most * (HEIGHT - TOP - BOTTOM)

    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="11" fill="#7d7f86">',
        f"<title>{title}</title>",
    ]
    for share in range(0, most + 1, 5):
        lines.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(share):.1f}" y2="{y(share):.1f}" '
            'stroke="#7d7f86" stroke-opacity="0.25"/>'
            f'<text x="{LEFT - 8}" y="{y(share) + 4:.1f}" text-anchor="end">{share} %</text>'
        )
    for number in range(1, rounds + 1):
        lines.append(
            f'<text x="{x(number):.1f}" y="{HEIGHT - BOTTOM + 18}" '
            f'text-anchor="middle">{number}</text>'
        )
    lines.append(f'<text x="{x((rounds + 1) / 2):.1f}" y="{HEIGHT - 8}">round</text>')
    last = -1e9
    for index, (name, values) in enumerate(sorted(found.items(), key=lambda item: -item[1][-1])):
        colour = COLOURS[index % len(COLOURS)]
        points = " ".join(f"{x(n):.1f},{y(v):.1f}" for n, v in enumerate(values, 1))
        last = max(y(values[-1]) + 4, last + 14)
        lines.append(
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>'
            f'<text x="{x(len(values)) + 8:.1f}" y="{last:.1f}" fill="{colour}">{name}</text>'
        )
    return "\n".join([*lines, "</svg>"]) + "\n"


def main() -> int:
    """Write the table, the figure, and whether the claims hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, help="what flexlora compare has made")
    folders = parser.parse_args().folders
    found = curves(folders)
    missing = {OURS, THEIRS} - found.keys()
    if missing:
        parser.error(f"{[str(f) for f in folders]} hold no finished run of {sorted(missing)}.")
    ranks = levels(folders)
    title = f"Share of the energy in the ranks {ranks[-2] + 1} to {ranks[-1]}"
    picture = result.RESULTS / "collapse.svg"
    picture.write_text(svg(found, title), encoding="utf-8")
    claims = [
        result.Claim(
            f"{title}, last round / first, {THEIRS}",
            found[THEIRS][-1] / found[THEIRS][0],
            0.5,
            at_least=False,
        ),
        result.Claim(
            f"{title}, last round / first, {OURS}",
            found[OURS][-1] / found[OURS][0],
            1.0,
            at_least=True,
        ),
    ]
    rounds = range(1, 1 + max(len(values) for values in found.values()))
    table = result.Table(
        f"{title}, percent, by round",
        ["method", *map(str, rounds)],
        [[name, *(f"{v:.2f}" for v in values)] for name, values in found.items()],
    )
    place = result.setting(1) | {"command": "python benchmarks/collapse.py runs/compare"}
    return result.finish("collapse", place, {"percent": found, "levels": ranks}, [table], claims)


if __name__ == "__main__":
    sys.exit(main())
