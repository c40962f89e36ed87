"""A round of small clients: our simulated federation, Flower's simulation, and Apple's pfl.

All train LoRA of one rank with FedAvg over the factors (our method ``fedit``), from the same
factors, on the same rows in the same order, each in its own process. Each peer runs in its own
environment, built from the pinned requirements in ``peers/``.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from peers.process import versions
from peers.race import KEEPING, OURS, PFL, RELOADING, Race, Turn, installed, measure
from peers.task import corpus_of, experiment, our_adapter, ours, peer_adapter, write
from result import Claim, Table, finish, setting

from flexlora.federation.setup import prepare
from flexlora.lowrank.sums import LowRankSum, norm

DISTANCE = 0.01
"""The largest relative distance of trained products that is attributed to rounding; with the same
rows in another order it is 0.7 (two clients, two steps)."""

ENVIRONMENTS = Path.home() / ".cache" / "flexlora-bench"
PACKAGES = {
    "flower": ("flwr", "ray", "torch", "transformers", "peft", "accelerate"),
    "pfl": ("pfl", "torch", "transformers", "peft"),
}


def agreement(race: Race, names: Iterable[str]) -> dict[str, float]:
    """The relative distance of each contestant's trained products, of its last turn, from ours."""
    last = race.options.repeats - 1
    mine = our_adapter(race.options, race.work / f"turn {last}, {OURS}")
    whole = math.hypot(*(norm(factors) for factors in mine.values()))
    found = {}
    for name in names:
        theirs = peer_adapter(race.options, race.work / f"turn {last}, {name}", list(mine))
        apart = [LowRankSum.of([(1.0, mine[m]), (-1.0, theirs[m])]).norm() for m in mine]
        found[name] = math.hypot(*apart) / whole
    return found


def summary(turns: Sequence[Turn]) -> dict[str, float]:
    """Medians over the turns of one contestant."""
    first = turns[0]
    per_round = first.tokens / len(first.round_seconds)
    seconds = statistics.median(turn.round for turn in turns)
    return {
        "round": seconds,
        "tokens_per_second": per_round / seconds,
        "outside": statistics.median(turn.outside for turn in turns),
        "whole": statistics.median(turn.seconds for turn in turns),
        "peak_mib": statistics.median(turn.peak_mib for turn in turns),
        "workers": first.workers,
        "loss": first.loss_total / first.loss_tokens,
    }


def claims_of(
    medians: Mapping[str, Mapping[str, float]],
    distances: Mapping[str, float],
    turns: Mapping[str, Sequence[Turn]],
    quick: bool,
) -> list[Claim]:
    """The speed against each peer, and checks that all did the same work; no result is a miss."""
    mine, nothing = medians[OURS], {"round": math.nan, "whole": math.nan}
    claims = []
    for name, bound in ((RELOADING, 4.0), (KEEPING, 4.0), (PFL, 2.0)):
        theirs = medians.get(name, nothing)
        text = f"seconds a round, {name} / ours"
        ratio = theirs["round"] / mine["round"]
        claims.append(Claim(text, ratio, bound, at_least=True, asserted=not quick))
        text = f"seconds of the whole process, start-up included, {name} / ours"
        ratio = theirs["whole"] / mine["whole"]
        claims.append(Claim(text, ratio, bound, at_least=True, asserted=False))
    losses = [abs(found["loss"] - mine["loss"]) for found in medians.values()]
    tokens = {turn.tokens for found in turns.values() for turn in found}
    claims += [
        Claim("largest difference of a mean loss from ours", max(losses), 1e-4, at_least=False),
        Claim(
            "largest relative distance of the trained products from ours",
            max(distances.values(), default=math.nan),
            DISTANCE,
            at_least=False,
        ),
        Claim("different counts of real tokens", float(len(tokens)), 1, at_least=False),
    ]
    return claims


def tables_of(
    medians: Mapping[str, Mapping[str, float]],
    distances: Mapping[str, float],
    faults: Mapping[str, str],
    packages: Mapping[str, Mapping[str, str]],
) -> list[Table]:
    """Speed, agreement, and the packages of the peers."""
    mine, speed, agree = medians[OURS], [], []
    for name, found in medians.items():
        speed.append(
            [
                name,
                int(found["workers"]),
                found["round"],
                found["round"] / mine["round"],
                found["tokens_per_second"],
                found["outside"],
                found["whole"],
                found["whole"] / mine["whole"],
                found["peak_mib"],
            ]
        )
        distance = distances.get(name, 0.0)
        agree.append([name, f"{found['loss']:.6f}", f"{distance:.2g}"])
    speed += [[name, "not measured", fault, *[""] * 6] for name, fault in faults.items()]
    head = ["contestant", "processes", "seconds a round", "it / ours", "real tokens/s"]
    head += ["seconds outside the rounds", "whole process, s", "it / ours", "peak memory, MiB"]
    return [
        Table("Speed (medians)", head, speed),
        Table(
            "The same work",
            ["contestant", "mean loss of all steps", "distance of the products from ours"],
            agree,
        ),
        Table(
            "The peers' environments",
            ["peer", "packages"],
            [[peer, ", ".join(f"{k} {v}" for k, v in of.items())] for peer, of in packages.items()],
        ),
    ]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="rows; default: sample.parquet")
    parser.add_argument("--clients", type=int, default=32, help="all of them in every round")
    parser.add_argument("--rounds", type=int, default=1, help="of each process")
    parser.add_argument("--steps", type=int, default=2, help="optimiser steps of a client")
    parser.add_argument("--batch", type=int, default=4, help="rows of a step")
    parser.add_argument("--prompt", default="plain")
    parser.add_argument("--max-tokens", type=int, default=192)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--alpha", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--workers",
        type=int,
        nargs="+",
        help="processes of a peer, which share the threads; of several the fastest in a trial "
        "with --trial-clients; default: 1, and as many as threads",
    )
    parser.add_argument("--trial-clients", type=int, default=2)
    parser.add_argument("--limit", type=float, default=1800, help="seconds of a process")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--environments", type=Path, default=ENVIRONMENTS)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="4 clients, 1 step of 2 rows, at most 48 tokens, once, no trial; no claim on speed",
    )
    parser.add_argument("--job", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.clients, options.steps, options.batch = 4, 1, 2
        options.max_tokens, options.repeats = 48, 1
        options.workers = options.workers or [options.threads]
    options.workers = options.workers or sorted({1, options.threads})
    for workers in options.workers:
        if options.threads % workers:
            parser.error(f"{options.threads} threads cannot be shared by --workers {workers}.")
    return options


def main() -> int:
    options = arguments()
    if options.job:
        ours(options)
        return 0
    pythons, faults = installed(options.environments)
    place = setting(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        race = Race(options, Path(folder), pythons)
        ready = prepare(experiment(options, race.work / "tokens"), corpus_of(options))
        write(ready, options, race.work / "task", options.clients)
        write(ready, options, race.work / "trial", min(options.trial_clients, options.clients))
        del ready
        found = measure(race, faults)
        turns: dict[str, list[Turn]] = found["turns"]
        distances = agreement(race, [name for name in turns if name != OURS])
    medians = {name: summary(of_one) for name, of_one in turns.items()}
    packages = {peer: versions(pythons[peer], PACKAGES[peer]) for peer in pythons}
    measurements = {
        "options": {k: str(v) for k, v in vars(options).items() if k not in ("job", "out")},
        "packages": packages,
        "not_measured": faults,
        "trials": found["trials"],
        "medians": medians,
        "distances": distances,
        "turns": {name: [asdict(turn) for turn in of_one] for name, of_one in turns.items()},
    }
    claims = claims_of(medians, distances, turns, options.quick)
    name = Path(__file__).stem + ("-quick" if options.quick else "")
    return finish(
        name, place, measurements, tables_of(medians, distances, faults, packages), claims
    )


if __name__ == "__main__":
    sys.exit(main())
