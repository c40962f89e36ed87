"""What one or two of ten malicious clients do to the model, by attack, defence and rank.

The simulation of ``flexlora attack`` on federations of ten clients of three rank types, each cell
compared with the honest run of its seed that has no defence. Two have a small random model and rows
of words: each client has words of its own, or all rows are dealt out at random. With ``--trained``
SmolLM2-135M on generated puzzles is the third. The loss is that on rows which clients that are
never malicious hold out.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from result import Claim, Table, finish, setting

from flexlora.data import Corpus
from flexlora.federation import compose
from flexlora.federation.attacks import NONE, AttackSettings, Outcome, kinds, plan, run
from flexlora.reporting.damage import Damage

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from support import models

BARS = {
    ("scale", "clip"): 0.02,
    ("scale-once", "clip"): 0.02,
    ("sign-flip", "geometric-median"): 0.05,
    ("collusion", "geometric-median"): 0.05,
}
"""The most by which the loss may grow, by attack and defence."""
DEFENCES = ("none", "clip", "geometric-median", "multi-krum", "fltrust")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--learning-rate", type=float, default=0.003)
    parser.add_argument("--attacks", default=",".join(kinds.KINDS))
    parser.add_argument("--defences", default=",".join(DEFENCES))
    parser.add_argument("--ranks", default="assigned")
    parser.add_argument("--trained", action="store_true", help="SmolLM2-135M alone, one seed")
    parser.add_argument("--quick", action="store_true", help="one seed, two rounds, the bars alone")
    return parser.parse_args()


def settings_of(options: argparse.Namespace) -> AttackSettings:
    """The cells; for ``--quick`` those that have a bar, and the honest ones."""
    attacks, defences = options.attacks.split(","), options.defences.split(",")
    if options.quick:
        attacks = [attack for attack, _ in BARS]
        defences = ["clip", "geometric-median"]
    single = options.quick or options.trained
    return AttackSettings(
        tuple(attacks), tuple(defences), tuple(options.ranks.split(",")), 0.1,
        1 if single else options.seeds,
    )  # fmt: skip


def ranks_of(small: int) -> dict[str, Any]:
    """Three rank types, each twice the one before."""
    sizes = {"small": small, "middle": 2 * small, "large": 4 * small}
    types = {name: {"attention": rank, "feed_forward": rank} for name, rank in sizes.items()}
    return {"types": types, "distribution": {"small": 0.3, "middle": 0.4, "large": 0.3}}


def federations(folder: Path, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The configs by what is in them; files of model and rows are written into the folder."""
    common = {
        "seed": 1,
        "method": {"name": "flexlora"},
        "federation": {"rounds": 2 if options.quick else options.rounds, "cohort": 10, "quorum": 5},
        "evaluation": {"client_share": 0.25},
        "run": {"threads": options.threads, "clients_at_once": 10},
    }
    if options.trained:
        trained = {
            "model": {"name": "smollm2-135m-instruct"},
            "data": {"format": "procedural", "clients": 10, "examples": 60, "max_tokens": 128},
            "ranks": ranks_of(4),
            "training": {
                "learning_rate": 1e-3,
                "schedule": "constant",
                "batch_examples": 4,
                "max_steps": 4,
                "pack_tokens": 512,
            },
        }
        return {"SmolLM2-135M, puzzles": common | trained}
    models.save(folder / "model")
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in rows_of(models.corpus(10, 40))))
    data = {"path": str(rows), "prompt": "plain", "max_tokens": 32, "unseen_clients": 0}
    tiny = {
        "model": {"name": str(folder / "model")},
        "ranks": ranks_of(2),
        "training": {
            "learning_rate": options.learning_rate,
            "schedule": "constant",
            "batch_examples": 4,
            "pack_tokens": 256,
        },
    }
    dealt = data | {"partition": {"kind": "iid", "clients": 10}}
    return {
        "words of their own": common | tiny | {"data": data},
        "rows dealt out at random": common | tiny | {"data": dealt},
    }


def rows_of(corpus: Corpus) -> Iterator[dict[str, str]]:
    """The rows of a corpus, without the split."""
    for client, example in zip(
        corpus.keys("client"), corpus.examples(range(len(corpus))), strict=True
    ):
        texts = {name: getattr(example, name) for name in ("instruction", "input", "output")}
        yield {"client": client, **texts}


def outcomes_of(
    name: str, config: Mapping[str, Any], chosen: AttackSettings, folder: Path
) -> list[Outcome]:
    """All cells of a federation, one after the other."""
    cells = plan(chosen, int(config["seed"]), folder)
    outcomes = []
    for outcome in run(
        compose.parse(dict(config), name),
        chosen,
        cells,
        lambda _, events: deque(events, maxlen=0),
    ):
        outcomes.append(outcome)
        print(f"{name}: {outcome.cell.name}: {outcome.scores or outcome.reason}", file=sys.stderr)
    return outcomes


def claims_of(name: str, damage: Damage, asserted: bool) -> list[Claim]:
    """The worst seed of every cell that has a bar."""
    claims = []
    for (attack, defence), most in BARS.items():
        changes = [
            damage.loss_change(o)
            for o in damage.outcomes
            if (o.cell.attack, o.cell.defence) == (attack, defence)
        ]
        if changes:
            worst = max(float("nan") if change is None else change for change in changes)
            text = f"{name}: growth of the loss, {attack} against {defence}, worst seed"
            claims.append(Claim(text, worst, most, False, asserted))
    return claims


def honest_loss(outcomes: Sequence[Outcome]) -> list[float | None]:
    """The loss of the honest runs without a defence, by seed."""
    honest = [o for o in outcomes if (o.cell.attack, o.cell.defence) == (NONE, "none")]
    return [None if o.scores is None else o.scores.loss for o in honest]


def main() -> int:
    options = arguments()
    place = setting(options.threads)
    torch.set_num_threads(options.threads)
    chosen = settings_of(options)
    tables, claims, measurements = [], [], {"options": vars(options)}
    with tempfile.TemporaryDirectory() as temporary:
        for number, (name, config) in enumerate(federations(Path(temporary), options).items()):
            outcomes = outcomes_of(name, config, chosen, Path(temporary) / str(number))
            damage = Damage(outcomes, chosen.undefended)
            tables += [
                Table(f"{name}: {each.title}", each.head, each.rows) for each in damage.listings()
            ]
            claims += claims_of(name, damage, not options.quick)
            measurements[name] = {
                "honest_losses": honest_loss(outcomes),
                "cells": [
                    {"cell": o.cell.name, "state": o.state, "scores": o.scores and asdict(o.scores)}
                    for o in outcomes
                ],
            }
    suffix = "-trained" * options.trained + "-quick" * options.quick
    return finish(Path(__file__).stem + suffix, place, measurements, tables, claims)


if __name__ == "__main__":
    sys.exit(main())
