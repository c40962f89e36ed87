"""Many adapters of different ranks: trained together, one after another, and by the Trainer.

Eight jobs of ranks 4 to 32, each on the rows of another client of Natural Instructions, on
SmolLM2-135M in float32. Three contestants do the same work, all on a base model that is in memory:

- flexlora, several jobs at a time, as ``train_adapters`` chooses;
- flexlora, one job after another (``at_once=1``);
- transformers.Trainer with PEFT, one job after another, with length-grouped sampling and
  micro-batches of four rows.

Every job takes the same 16 rows, once in steps of four rows and once in a single step of 16. The
seconds of flexlora are those of the whole call, with tokenising, those of the Trainer of
``trainer.train()`` alone. The adapters of the first two are compared, and on one job's rows in the
same order the loss of the first step with the Trainer's.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from local_training import Peft, Work
from result import Claim, Table, data_file, finish, setting

from flexlora import Adapter, Job, Source, Training, train_adapters
from flexlora.data.corpora import table
from flexlora.data.tokens import TokenStore
from flexlora.lowrank.sums import LowRankSum, norm
from flexlora.model import smollm2
from flexlora.model.base import Base
from flexlora.seeds import rng

RANKS = (4, 6, 8, 12, 16, 20, 24, 32)
TOGETHER, ALONE, TRAINER = "flexlora, together", "flexlora, one by one", "Trainer + PEFT"
MICRO = 4


@dataclass(frozen=True)
class Turn:
    """All jobs trained once by one contestant."""

    seconds: float
    samples: int
    adapters: dict[str, Adapter]

    @property
    def speed(self) -> float:
        """Samples per second."""
        return self.samples / self.seconds


def jobs_of(options: argparse.Namespace, batch: int) -> list[Job]:
    """A job of each rank, on the first rows of a client of its own.

    Raises:
        ValueError: the data has too few clients with as many training rows.
    """
    corpus = table.read(data_file(options.data, "sample.parquet"), table.Columns())
    training = corpus.select(corpus.keys("split") == "train")
    owners = np.array([str(owner) for owner in training.keys("client")])
    names, sizes = np.unique(owners, return_counts=True)
    able = names[sizes >= options.rows]
    ranks = RANKS[: options.jobs]
    if len(able) < len(ranks):
        raise ValueError(f"{len(able)} clients have {options.rows} training rows; lower --rows.")
    chosen = rng(options.seed, "clients").permutation(able)[: len(ranks)]
    settings = Training(learning_rate=5e-4, batch_examples=batch)
    return [
        Job(
            f"rank{rank}",
            training.select(np.flatnonzero(owners == client)[: options.rows]),
            rank=rank,
            training=settings,
            seed=options.seed,
            max_tokens=options.max_tokens,
        )
        for rank, client in zip(ranks, chosen, strict=True)
    ]


def ours(base: Base, jobs: Sequence[Job], at_once: int | None) -> Turn:
    """The jobs trained by ``train_adapters``."""
    started = time.perf_counter()
    results = train_adapters(base, jobs, at_once=at_once)
    seconds = time.perf_counter() - started
    trained = {result.name: result.adapter for result in results if result.adapter is not None}
    return Turn(seconds, sum(result.examples for result in results), trained)


def work_of(base: Base, job: Job, threads: int) -> Work:
    """One job as the Trainer's benchmark has it."""
    store = TokenStore.build(job.corpus(), base.tokenizer, job.template, job.max_tokens, None)
    start = job.start(base, job.ranks(base))
    return Work(store, [range(len(store))], job.training, start, job.seed, threads)


def trainers(base: Base, jobs: Sequence[Job], folder: Path, threads: int) -> Turn:
    """The jobs trained by transformers.Trainer, one after another; loading is not counted."""
    seconds, samples = 0.0, 0
    for job in jobs:
        other = Peft.load(smollm2.folder(), job.rank, int(job.training.alpha), folder)
        turn = other.turn(work_of(base, job, threads), MICRO, "group_by_length")
        seconds, samples = seconds + turn.seconds, samples + turn.samples
    return Turn(seconds, samples, {})


def first_losses(base: Base, job: Job, folder: Path, threads: int) -> tuple[float, float]:
    """The loss of a job's first step: ours, and the Trainer's on the same rows."""
    (result,) = train_adapters(base, [job])
    other = Peft.load(smollm2.folder(), job.rank, int(job.training.alpha), folder)
    turn = other.turn(work_of(base, job, threads), MICRO, "sequential")
    return result.losses[0], turn.losses[0]


def gap(one: Turn, two: Turn) -> float:
    """The largest relative distance of two contestants' adapters, over all modules of a job."""
    distances = []
    for name, adapter in one.adapters.items():
        other = two.adapters[name]
        apart = [LowRankSum.of([(1.0, f), (-1.0, other[m])]).norm() for m, f in adapter.items()]
        sizes = [norm(f) for f in other.values()]
        distances.append(float(np.linalg.norm(apart) / np.linalg.norm(sizes)))
    return max(distances)


def contest(base: Base, options: argparse.Namespace, batch: int, folder: Path) -> dict[str, Any]:
    """Alternating turns of the contestants after a warm-up of one job."""
    jobs = jobs_of(options, batch)
    contestants: dict[str, Callable[[Sequence[Job]], Turn]] = {
        TOGETHER: lambda some: ours(base, some, None),
        ALONE: lambda some: ours(base, some, 1),
        TRAINER: lambda some: trainers(base, some, folder, options.threads),
    }
    repeats = {TOGETHER: options.repeats, ALONE: options.repeats, TRAINER: options.peer_repeats}
    turns: dict[str, list[Turn]] = {name: [] for name in contestants}
    for train in contestants.values():
        train(jobs[:1])
    for repeat in range(max(repeats.values())):
        for name, train in contestants.items():
            if repeat < repeats[name]:
                turns[name].append(train(jobs))
                print(f"{batch}, {name}: {turns[name][-1].speed:.2f} samples/s", file=sys.stderr)
    mine, trainer = first_losses(base, jobs[0], folder, options.threads)
    return {
        "batch": batch,
        "seconds": {name: [turn.seconds for turn in some] for name, some in turns.items()},
        "samples": turns[TOGETHER][0].samples,
        "speeds": {
            name: statistics.median(turn.speed for turn in some) for name, some in turns.items()
        },
        "gap": gap(turns[TOGETHER][0], turns[ALONE][0]),
        "first_step_loss": {"ours": mine, "trainer": trainer},
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, help="rows; default: sample.parquet")
    parser.add_argument("--jobs", type=int, default=len(RANKS), help=f"at most {len(RANKS)}")
    parser.add_argument("--rows", type=int, default=16, help="rows of a job")
    parser.add_argument("--batches", type=int, nargs="+", default=[4, 16], help="rows of a step")
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3, help="turns of flexlora")
    parser.add_argument("--peer-repeats", type=int, default=2, help="turns of the Trainer")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="2 jobs, once; no claim on speed")
    options = parser.parse_args()
    if options.quick:
        options.jobs, options.repeats, options.peer_repeats = 2, 1, 1
    return options


def main() -> int:
    options = arguments()
    torch.set_num_threads(options.threads)
    place = setting(options.threads)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    base = Source(smollm2.NAME).load()
    with tempfile.TemporaryDirectory() as folder:
        found = [contest(base, options, batch, Path(folder)) for batch in options.batches]
    rows = [
        [f"{each['batch']} rows", name, speed, each["speeds"][TOGETHER] / speed]
        for each in found
        for name, speed in each["speeds"].items()
    ]
    tables = [Table("Speed", ["a step", "contestant", "samples/s (median)", "together / it"], rows)]
    measurements = {
        "options": {k: v for k, v in vars(options).items() if k != "data"},
        "ranks": RANKS[: options.jobs],
        "contests": found,
    }
    name = Path(__file__).stem + ("-quick" if options.quick else "")
    return finish(name, place, measurements, tables, claims_of(found, not options.quick))


def claims_of(found: Sequence[dict[str, Any]], asserted: bool) -> list[Claim]:
    """The claims about speed, and that the same work was done."""
    claims = []
    for each in found:
        speeds, losses, step = each["speeds"], each["first_step_loss"], f"steps of {each['batch']}"
        one_by_one, trainer = (speeds[TOGETHER] / speeds[name] for name in (ALONE, TRAINER))
        claims += [
            Claim(f"{step}: together / one by one", one_by_one, 0.95, True, asserted),
            Claim(f"{step}: together / Trainer + PEFT", trainer, 1.5, True, asserted),
            Claim(
                f"{step}: distance of the adapters, together and one by one",
                each["gap"],
                1e-2,
                False,
            ),
            Claim(
                f"{step}: difference of the first step's losses to the Trainer's",
                abs(losses["ours"] - losses["trainer"]),
                1e-4,
                False,
            ),
        ]
    return claims


if __name__ == "__main__":
    sys.exit(main())
