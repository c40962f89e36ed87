"""Rank collapse in real training: the energy in the highest block of ranks, round by round.

Reads the journals of ``flexlora compare configs/compare.toml`` (24 clients of ranks 8 to 64 on
Natural Instructions, ten rounds), and plots for the global adapter the share of its energy in
the ranks that only the largest clients have, averaged over the modules.

    flexlora compare configs/compare.toml --methods flexlora,flexfold,raflora --out runs/compare
    python benchmarks/collapse.py runs/compare
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import collapse_figure
import result

from flexlora.journal.record import Record

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
    picture.write_text(collapse_figure.svg(found, ranks), encoding="utf-8")
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
