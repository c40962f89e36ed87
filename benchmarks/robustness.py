"""What one or two of ten malicious clients do to the model, by attack, defence and rank.

The simulation of ``flexlora attack`` with SmolLM2-135M on generated puzzles, ten clients of ranks
4, 8 and 16. Each cell is compared with the honest run of its seed that has no defence, by the loss
on rows which clients that are never malicious hold out. A small random model is no measure of
damage: its loss changes by a tenth where one honest client stays away. ``--quick`` uses it.
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
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--attacks", default=",".join(kinds.KINDS))
    parser.add_argument("--defences", default=",".join(DEFENCES))
    parser.add_argument("--ranks", default="assigned")
    parser.add_argument("--quick", action="store_true", help="a small model, two rounds, the bars")
    return parser.parse_args()


def settings_of(options: argparse.Namespace) -> AttackSettings:
    """The cells; for ``--quick`` those that have a bar, and the honest ones."""
    attacks, defences = options.attacks.split(","), options.defences.split(",")
    if options.quick:
        attacks = [attack for attack, _ in BARS]
        defences = ["clip", "geometric-median"]
    ranks = tuple(options.ranks.split(","))
    return AttackSettings(tuple(attacks), tuple(defences), ranks, 0.1, options.seeds)


def ranks_of(small: int) -> dict[str, Any]:
    """Three rank types, each twice the one before."""
    sizes = {"small": small, "middle": 2 * small, "large": 4 * small}
    types = {name: {"attention": rank, "feed_forward": rank} for name, rank in sizes.items()}
    return {"types": types, "distribution": {"small": 0.3, "middle": 0.4, "large": 0.3}}


def config_of(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The federation; for ``--quick`` its model and rows are written into the folder."""
    common = {
        "seed": 1,
        "method": {"name": "flexlora"},
        "federation": {"rounds": 2 if options.quick else options.rounds, "cohort": 10, "quorum": 5},
        "evaluation": {"client_share": 0.25},
        "run": {"threads": options.threads},
    }
    training = {"learning_rate": 2e-3, "schedule": "constant", "batch_examples": 4}
    if not options.quick:
        return common | {
            "model": {"name": "smollm2-135m-instruct", "dtype": options.dtype},
            "data": {"format": "procedural", "clients": 10, "examples": 40, "max_tokens": 128},
            "ranks": ranks_of(4),
            "training": training | {"max_steps": 2, "pack_tokens": 512},
        }
    models.save(folder / "model")
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in rows_of(models.corpus(10, 40))))
    return common | {
        "model": {"name": str(folder / "model")},
        "data": {"path": str(rows), "prompt": "plain", "max_tokens": 32, "unseen_clients": 0},
        "ranks": ranks_of(2),
        "training": training | {"pack_tokens": 256},
    }


def rows_of(corpus: Corpus) -> Iterator[dict[str, str]]:
    """The rows of a corpus, without the split."""
    for client, example in zip(
        corpus.keys("client"), corpus.examples(range(len(corpus))), strict=True
    ):
        texts = {name: getattr(example, name) for name in ("instruction", "input", "output")}
        yield {"client": client, **texts}


def outcomes_of(config: Mapping[str, Any], chosen: AttackSettings, folder: Path) -> list[Outcome]:
    """All cells, one after the other."""
    experiment = compose.parse(dict(config), "robustness")
    cells = plan(chosen, experiment.seed, folder)
    outcomes = []
    for outcome in run(experiment, chosen, cells, lambda _, events: deque(events, maxlen=0)):
        outcomes.append(outcome)
        print(f"{outcome.cell.name}: {outcome.scores or outcome.reason}", file=sys.stderr)
    return outcomes


def claims_of(damage: Damage, asserted: bool) -> list[Claim]:
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
            text = f"growth of the loss, {attack} against {defence}, worst seed"
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
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        outcomes = outcomes_of(config_of(folder, options), chosen, folder / "attack")
    damage = Damage(outcomes, chosen.undefended)
    measurements = {
        "options": vars(options),
        "honest_losses": honest_loss(outcomes),
        "cells": [
            {"cell": o.cell.name, "state": o.state, "scores": o.scores and asdict(o.scores)}
            for o in outcomes
        ],
    }
    tables = [Table(each.title, each.head, each.rows) for each in damage.listings()]
    name = Path(__file__).stem + ("-quick" if options.quick else "")
    return finish(name, place, measurements, tables, claims_of(damage, not options.quick))


if __name__ == "__main__":
    sys.exit(main())
