"""The cost of more clients: in the population, and in the cohort.

Populations of 10 to 10,000 clients with twenty Natural Instructions rows each, cohorts of eight,
two rounds; then cohorts of 8 to 512 out of 1,000 clients. Every measurement is a separate
process, whose peak memory is the kernel's VmHWM. A tiny model with random weights shows growth
that a real one would hide; the claim is about SmolLM2-135M with ranks up to 200.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
import transformers
from memory import sampling
from result import Claim, Table, data_file, finish, setting, status_kib

from flexlora import config
from flexlora.config.ranks import PAPER_TYPES, RankType, assign
from flexlora.federation.rounds import run
from flexlora.federation.sampling import cohort
from flexlora.federation.setup import prepare
from flexlora.model import smollm2
from flexlora.seeds import rng

ROWS = 20
"""Rows of a client, of which a fifth are test rows."""

COHORT = 8
COHORTS_OF = 1000

TINY_TYPES = {"type1": (2, 2), "type2": (8, 8), "type3": (8, 32), "type4": (32, 32)}
"""The paper's four rank types, scaled to a model of width 64."""

SMALL, LARGE = 100, 10_000
DRIFT, SLOWER, NONLINEAR = 0.05, 1.1, 1.25


def tiny_model(folder: Path, source: Path) -> None:
    """A Llama with two layers, random weights and a vocabulary of 1,024 tokens.

    With SmolLM2's vocabulary the logits, whose size depends on the answers of a cohort, would be
    the largest part of the memory.
    """
    texts = pq.read_table(source, columns=["instruction"]).slice(0, 20_000)["instruction"]
    whole = transformers.AutoTokenizer.from_pretrained(smollm2.folder())
    tokenizer = whole.train_new_from_iterator(pc.unique(texts).to_pylist(), 1024)
    shape = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def populations(source: Path, sizes: Sequence[int], folder: Path) -> None:
    """One Parquet file for each population size; a client is a run of twenty rows of one task.

    The clients are drawn at random from all such runs, so that populations differ only in size;
    smaller ones are subsets of larger ones. The rows of a client are contiguous.

    Raises:
        ValueError: the source has too few rows.
    """
    table = pq.read_table(source)
    table = table.take(pc.sort_indices(table["client"]))
    _, counts = np.unique(table["client"].to_numpy(), return_counts=True)
    starts = np.cumsum([0, *counts[:-1]])
    cuts = [s + ROWS * i for s, n in zip(starts, counts, strict=True) for i in range(n // ROWS)]
    if len(cuts) < max(sizes):
        raise ValueError(
            f"'{source}' gives {len(cuts)} clients of {ROWS} rows; ask for no more than that, "
            f"not {max(sizes)}."
        )
    drawn = np.random.default_rng(0).permutation(np.array(cuts))
    split = ["train"] * (ROWS * 4 // 5) + ["test"] * (ROWS - ROWS * 4 // 5)
    for size in sizes:
        rows = (drawn[:size, None] + np.arange(ROWS)).ravel()
        part = table.take(pa.array(rows)).drop_columns(["client", "split"])
        part = part.append_column("client", pa.array(np.repeat(names(size), ROWS)))
        part = part.append_column("split", pa.array(split * size))
        pq.write_table(part, folder / f"{size}.parquet")


def names(size: int) -> list[str]:
    """The clients of a population, in the order of its file."""
    return [f"client-{i:06d}" for i in range(size)]


def seed_of(size: int, rounds: int) -> int:
    """A seed for which each round's cohort has two clients of each rank type.

    With it rounds of different populations do the same work. The draws are those of
    ``federation.setup`` and ``federation.rounds``; the measured process checks the result.
    """
    clients, shares = names(size), dict.fromkeys(PAPER_TYPES, 0.25)
    for seed in range(1_000_000):
        of = assign(clients, PAPER_TYPES, shares, rng(seed, "ranks")).of
        cohorts = [cohort(clients, COHORT, rng(seed, "cohort", r + 1)) for r in range(rounds)]
        if all(set(Counter(of[id] for id in c).values()) == {2} for c in cohorts):
            return seed
    raise ValueError(f"No seed gives {size} clients even cohorts.")


def experiment(job: argparse.Namespace) -> config.Experiment:
    """The measured federation, without evaluation, whose cost depends on its settings."""
    types = PAPER_TYPES
    if job.model == "tiny":
        types = {name: RankType(*ranks) for name, ranks in TINY_TYPES.items()}
    name = str(job.work / "tiny") if job.model == "tiny" else smollm2.NAME
    return config.parse(
        {
            "seed": job.seed,
            "model": {"name": name},
            "data": {
                "path": str(job.work / f"{job.clients}.parquet"),
                "max_tokens": job.max_tokens,
                "cache": str(job.work / "cache"),
            },
            "ranks": {
                "types": {
                    name: {"attention": t.attention, "feed_forward": t.feed_forward}
                    for name, t in types.items()
                },
                "distribution": dict.fromkeys(types, 0.25),
            },
            "training": {
                "optimizer": "adamw",
                "batch_examples": 4,
                "max_steps": job.steps,
                "pack_tokens": 256,
                "recompute_above": 256,
            },
            "federation": {"rounds": job.rounds, "cohort": job.cohort},
            "evaluation": {
                "base": False,
                "truncated": False,
                "seen_clients": 0,
                "unseen_clients": 0,
            },
            "run": {"threads": job.threads},
        },
        "benchmarks/growth.py",
    )


def preparation(job: argparse.Namespace) -> dict[str, Any]:
    """Everything before the first round; corpus and tokens are created or read from the cache."""
    started = time.perf_counter()
    ready = prepare(experiment(job))
    return {
        "seconds": time.perf_counter() - started,
        "peak_mib": status_kib("VmHWM") / 1024,
        "rows": len(ready.runtime.store),
        "tokens": int(ready.runtime.store.offsets[-1]),
    }


def rounds(job: argparse.Namespace) -> dict[str, Any]:
    """The rounds, with a warm cache.

    Raises:
        ValueError: the cohorts are not as even as the seed should make them.
    """
    started = time.perf_counter()
    settings = experiment(job)
    with tempfile.TemporaryDirectory(dir=job.work) as folder, sampling() as largest:
        ready = prepare(settings)
        prepared = time.perf_counter() - started
        before = {name: status_kib(name) / 1024 for name in ("VmHWM", "RssAnon", "RssFile")}
        events = list(run(ready, Path(folder) / "run"))
    types = Counter(e["rank_type"] for e in events if e["event"] == "client")
    if job.even and set(types.values()) != {2 * job.rounds}:
        raise ValueError(f"The cohorts of {job.clients} clients have {dict(types)}; seed_of errs.")
    told = [e for e in events if e["event"] == "round"]
    turns = [
        sum(e["seconds"] for e in events if e["event"] == "client" and e["round"] == r["round"])
        for r in told
    ]
    return {
        "peak_mib": status_kib("VmHWM") / 1024,
        "peak_sampled_mib": largest,
        "before_rounds_mib": before,
        "start_seconds": prepared,
        "round_seconds": [e["seconds"] for e in told],
        "aggregate_seconds": [e["aggregate_seconds"] for e in told],
        "training_seconds": turns,
        "tokens": [e["tokens"] for e in told],
        "cohort": dict(sorted(types.items())),
    }


def in_process(job: argparse.Namespace, kind: str) -> dict[str, Any]:
    """Run a job in a separate process, so that the peak memory is only its own.

    Raises:
        RuntimeError: the process failed; its message is printed above.
    """
    told = {**vars(job), "kind": kind, "work": str(job.work)}
    command = [sys.executable, __file__, "--job", json.dumps(told)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"'{kind}' of {told} failed; see its message above.")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    what = f"{kind}, {job.model}, {job.cohort} of {job.clients} clients"
    print(f"{what}: {found['peak_mib']:.0f} MiB", file=sys.stderr)
    return found


def job(options: argparse.Namespace, work: Path, **settings: Any) -> argparse.Namespace:
    """One planned measurement; ``settings`` replace the defaults of its model."""
    shared = {"work": work, "threads": options.threads, "max_tokens": options.max_tokens}
    usual = {"steps": 2, "rounds": 2, "cohort": COHORT, "seed": 0, "even": False}
    return argparse.Namespace(**{**shared, **usual, **settings})


def measure(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Files and caches first, then populations and cohorts in turn, ``repeats`` times."""
    sizes = sorted({*options.populations, *options.headline, options.cohorts_of})
    source = data_file(options.data, "clients.parquet")
    populations(source, sizes, work)
    tiny_model(work / "tiny", source)
    plan = {f"tiny-{n}": job(options, work, model="tiny", clients=n) for n in options.populations}
    plan |= {
        f"smollm2-{n}": job(options, work, model="smollm2", clients=n, steps=1, rounds=1)
        for n in options.headline
    }
    for each in plan.values():
        each.seed, each.even = seed_of(each.clients, each.rounds), True
    many = {"model": "tiny", "clients": options.cohorts_of, "rounds": 1}
    plan |= {f"cohort-{c}": job(options, work, **many, cohort=c) for c in options.cohorts}
    made = {}
    for each in plan.values():
        key = f"{each.model}-{each.clients}"
        if key not in made:
            made[key] = in_process(each, "preparation")
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in plan}
    for turn in range(options.repeats):
        for name, each in plan.items():
            if turn < options.headline_repeats or each.model == "tiny":
                found[name].append(in_process(each, "rounds"))
    return {"preparation": made, "runs": found}


def median(turns: Sequence[dict[str, Any]], *path: str | int) -> float:
    """The median over the turns of the value at a path in each."""
    values = []
    for value in turns:
        for key in path:
            value = value[key]
        values.append(value)
    return float(statistics.median(values))


def claims_of(found: dict[str, Any], options: argparse.Namespace) -> list[Claim]:
    """Peaks and times of the largest case over those of a small one."""
    runs, asserted = found["runs"], not options.quick
    claims = []
    for model, sizes in (("tiny", options.populations), ("smollm2", options.headline)):
        if len(sizes) > 1:
            small = SMALL if SMALL in sizes else sizes[0]
            peaks = [median(runs[f"{model}-{n}"], "peak_mib") for n in (small, sizes[-1])]
            text = f"{model}: peak of {sizes[-1]} clients over that of {small}, less one"
            claims.append(Claim(text, peaks[1] / peaks[0] - 1, DRIFT, False, asserted))
    times = [median(runs[f"tiny-{n}"], "round_seconds", -1) for n in options.populations]
    text = f"tiny: a round of {COHORT} among {options.populations[-1]} clients over one among "
    text += f"{options.populations[0]}, in seconds"
    claims.append(Claim(text, times[-1] / times[0], SLOWER, False, asserted))
    ends = [runs[f"cohort-{c}"] for c in (options.cohorts[0], options.cohorts[-1])]
    peaks = [median(turns, "peak_mib") for turns in ends]
    text = f"tiny: peak of a cohort of {options.cohorts[-1]} over that of {options.cohorts[0]}"
    claims.append(Claim(f"{text}, less one", peaks[1] / peaks[0] - 1, DRIFT, False, asserted))
    each = [
        median(turns, "round_seconds", 0) / count
        for turns, count in zip(ends, (options.cohorts[0], options.cohorts[-1]), strict=True)
    ]
    text = f"tiny: seconds a client in a cohort of {options.cohorts[-1]} over {options.cohorts[0]}"
    claims.append(Claim(text, each[1] / each[0], NONLINEAR, False, asserted))
    return claims


def tables_of(found: dict[str, Any], options: argparse.Namespace) -> list[Table]:
    """Populations, cohorts, and what making corpus and tokens cost."""
    head = ["peak (VmHWM), MiB", "allocated alone (RssAnon)", "peak before the first round"]
    head += ["start, s", "round, s", "of it training", "of it aggregation", "tokens"]

    def row(turns: Sequence[dict[str, Any]]) -> list[object]:
        peaks = [median(turns, "peak_mib"), median(turns, "peak_sampled_mib", "RssAnon")]
        before = [median(turns, "before_rounds_mib", "VmHWM"), median(turns, "start_seconds")]
        timed = ("round_seconds", "training_seconds", "aggregate_seconds")
        return [*peaks, *before, *(median(turns, t, -1) for t in timed), turns[0]["tokens"][-1]]

    runs = found["runs"]
    sized = [("tiny", n) for n in options.populations] + [("smollm2", n) for n in options.headline]
    grown = [[model, n, *row(runs[f"{model}-{n}"])] for model, n in sized]
    cohorts = [[c, *row(runs[f"cohort-{c}"])] for c in options.cohorts]
    made = [
        [key.replace("-", ", "), m["rows"], m["tokens"], m["seconds"], m["peak_mib"]]
        for key, m in found["preparation"].items()
    ]
    return [
        Table(f"Clients in the population, {COHORT} a round", ["model", "clients", *head], grown),
        Table(f"Clients a round, of {options.cohorts_of} (tiny)", ["cohort", *head], cohorts),
        Table(
            "First start: corpus and tokens made, in a process before",
            ["model, clients", "rows", "tokens", "seconds", "peak, MiB"],
            made,
        ),
    ]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="rows; default: clients.parquet")
    parser.add_argument("--populations", type=int, nargs="+", default=[10, SMALL, 1000, LARGE])
    parser.add_argument("--headline", type=int, nargs="*", default=[SMALL, LARGE])
    parser.add_argument("--cohorts", type=int, nargs="+", default=[8, 32, 128, 512])
    parser.add_argument("--cohorts-of", type=int, default=COHORTS_OF)
    parser.add_argument("--max-tokens", type=int, default=96, help="nearly all rows reach it")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--headline-repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--work", type=Path, help="where files are kept; default: removed after")
    parser.add_argument(
        "--quick", action="store_true", help="10 and 40 clients, cohorts of 8 and 16, tiny, once"
    )
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.populations, options.headline, options.repeats = [10, 40], [], 1
        options.cohorts, options.cohorts_of = [8, 16], 40
    return options


def main() -> int:
    options = arguments()
    if options.job:
        told = argparse.Namespace(**{**options.job, "work": Path(options.job["work"])})
        print(json.dumps({"preparation": preparation, "rounds": rounds}[told.kind](told)))
        return 0
    smollm2.folder()  # converted here if need be, not in a process that is measured
    place = setting(options.threads)
    if options.work is None:
        with tempfile.TemporaryDirectory() as folder:
            found = measure(options, Path(folder))
    else:
        options.work.mkdir(parents=True, exist_ok=True)
        found = measure(options, options.work)
    name = Path(__file__).stem + ("-quick" if options.quick else "")
    return finish(name, place, found, tables_of(found, options), claims_of(found, options))


if __name__ == "__main__":
    sys.exit(main())
