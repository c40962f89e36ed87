"""Peak memory of a federation for different numbers of clients.

For each population size one round of eight clients of the paper's four rank types (8 to 200)
runs in a separate process, and the kernel's VmHWM of that process is its peak memory. It is
compared with a process that loads the base model and runs one forward pass. The token store is
created by an earlier process, so that the round has a warm cache.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from result import Claim, Table, data_file, finish, setting, status_kib

from flexlora import config
from flexlora.federation.prepared import PreparedRun
from flexlora.federation.rounds import run
from flexlora.federation.setup import prepare
from flexlora.model import smollm2
from flexlora.model.source import Source

MODEL = "smollm2-135m-instruct"
LARGEST = "type4"
"""The paper's rank type with rank 200 everywhere, which determines the peak."""

OVER_BASE_GIB = 1.5
DRIFT = 0.05


def experiment(options: argparse.Namespace, clients: int, work: Path) -> config.Experiment:
    """The measured federation, without evaluation, whose cost depends on its settings."""
    return config.parse(
        {
            "seed": options.seed,
            "model": {"name": MODEL},
            "data": {
                "path": str(data_file(options.data, "clients.parquet")),
                "clients": clients,
                "max_tokens": options.max_tokens,
                "cache": str(work / "tokens"),
            },
            "ranks": {"distribution": "uniform"},
            "training": {
                "optimizer": "adamw",
                "batch_examples": 6,
                "max_steps": options.steps,
                "pack_tokens": 256,
                "recompute_above": 256,
            },
            "federation": {"rounds": 1, "cohort": 8},
            "evaluation": {
                "base": False,
                "truncated": False,
                "seen_clients": 0,
                "unseen_clients": 0,
            },
            "run": {"threads": options.threads},
        },
        "benchmarks/memory.py",
    )


def base_only(options: argparse.Namespace) -> dict[str, Any]:
    """Load the base model and run one forward pass of ``max_tokens``, which touches all of it."""
    torch.set_num_threads(options.threads)
    base = Source(MODEL).load()
    tokens = torch.arange(options.max_tokens)
    with torch.no_grad():
        base.logits(tokens[None], tokens[None], torch.tensor([0, len(tokens)]), tokens[-1:])
    return {
        "peak_mib": status_kib("VmHWM") / 1024,
        "anonymous_mib_at_end": status_kib("RssAnon") / 1024,
    }


def preparation(options: argparse.Namespace, clients: int, work: Path) -> dict[str, Any]:
    """Everything before the first round; the token store is created or opened."""
    return _prepared(options, clients, work)[1]


def federation(options: argparse.Namespace, clients: int, work: Path) -> dict[str, Any]:
    """One round, from the config to the checkpoint.

    Raises:
        ValueError: no client of the largest rank took part, so the peak would be meaningless.
    """
    ready, prepared = _prepared(options, clients, work)
    started, events, peaks = time.perf_counter(), [], []
    with tempfile.TemporaryDirectory(dir=work) as folder, sampling() as largest:
        for event in run(ready, Path(folder) / "run"):
            events.append(event)
            after = f"{event['event']} {event.get('rank_type', '')}".strip()
            peaks.append([after, status_kib("VmHWM") / 1024])
    types = Counter(event["rank_type"] for event in events if event["event"] == "client")
    if LARGEST not in types:
        raise ValueError(
            f"The cohort of {clients} clients has none of {LARGEST} but {dict(types)}; "
            f"give another --seed than {options.seed}."
        )
    return {
        "peak_mib": status_kib("VmHWM") / 1024,
        "peak_sampled_mib": largest,
        "peaks_after_events_mib": peaks,
        "seconds": time.perf_counter() - started,
        "cohort": dict(sorted(types.items())),
        "tokens_trained": sum(e["tokens"] for e in events if e["event"] == "round"),
        "prepared": prepared,
    }


@contextmanager
def sampling() -> Iterator[dict[str, float]]:
    """The largest resident sets in MiB, sampled fifty times a second.

    ``RssAnon`` is allocated memory; ``RssFile`` are pages of mapped files, which the kernel can
    reclaim. VmHWM counts both.
    """
    largest = dict.fromkeys(("VmRSS", "RssAnon", "RssFile"), 0.0)
    stop = threading.Event()

    def look() -> None:
        while not stop.wait(0.02):
            for name in largest:
                largest[name] = max(largest[name], status_kib(name) / 1024)

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        yield largest
    finally:
        stop.set()
        watcher.join()


def _prepared(
    options: argparse.Namespace, clients: int, work: Path
) -> tuple[PreparedRun, dict[str, Any]]:
    before = set((work / "tokens").glob("*"))
    started = time.perf_counter()
    ready = prepare(experiment(options, clients, work))
    return ready, {
        "peak_mib": status_kib("VmHWM") / 1024,
        "seconds": time.perf_counter() - started,
        "clients": len(ready.clients),
        "rows": len(ready.runtime.store),
        "tokens": int(ready.runtime.store.offsets[-1]),
        "store_was_cached": set((work / "tokens").glob("*")) == before,
    }


def in_process(job: str, clients: int, options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Run a job in a separate process, so that the peak memory is only its own.

    Raises:
        RuntimeError: the process failed; its message is printed above.
    """
    command = [sys.executable, __file__, *sys.argv[1:]]
    command += ["--job", job, "--clients", str(clients), "--work", str(work)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"'{job}' of {clients} clients failed; see its message above.")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(f"{job}, {clients} clients: {found['peak_mib']:.0f} MiB", file=sys.stderr)
    return found


def measure(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """The base model, then each population with a cold and a warm cache, ``repeats`` times."""
    sizes = options.populations
    cold = {n: in_process("preparation", n, options, work) for n in sizes}
    base: list[dict[str, Any]] = []
    runs: dict[int, list[dict[str, Any]]] = {n: [] for n in sizes}
    for _ in range(options.repeats):
        base.append(in_process("base", 0, options, work))
        for n in sizes:
            runs[n].append(in_process("federation", n, options, work))
    return {"base": base, "cold_preparation": cold, "runs": runs}


def peak(turns: Sequence[dict[str, Any]]) -> float:
    """The median of the peaks, in MiB."""
    return float(statistics.median(turn["peak_mib"] for turn in turns))


def claims_of(found: dict[str, Any], options: argparse.Namespace) -> list[Claim]:
    """The peak above the base model's, and its growth with the population."""
    sizes, asserted = options.populations, not options.quick
    peaks = {n: peak(found["runs"][n]) for n in sizes}
    over = (peaks[sizes[-1]] - peak(found["base"])) / 1024
    drift = abs(peaks[sizes[-1]] / peaks[sizes[-2]] - 1)
    warm = all(t["prepared"]["store_was_cached"] for turns in found["runs"].values() for t in turns)
    return [
        Claim(
            f"peak of {sizes[-1]} clients above the base model alone, GiB",
            over,
            OVER_BASE_GIB,
            at_least=False,
            asserted=asserted,
        ),
        Claim(
            f"relative difference of the peaks of {sizes[-2]} and {sizes[-1]} clients",
            drift,
            DRIFT,
            at_least=False,
            asserted=asserted,
        ),
        Claim("runs that had to make their token store", float(not warm), 0, at_least=False),
    ]


def tables_of(found: dict[str, Any], options: argparse.Namespace) -> list[Table]:
    """Peaks of the runs, then of creating the token stores."""
    base = peak(found["base"])
    touched = found["base"][0]["anonymous_mib_at_end"]
    runs: list[list[object]] = [["base model, one forward pass", base, 0.0, touched, *[""] * 3]]
    cold = []
    for n in options.populations:
        turns = found["runs"][n]
        first, made = turns[0], found["cold_preparation"][n]
        cohort = ", ".join(f"{count} {name}" for name, count in first["cohort"].items())
        before = statistics.median(turn["prepared"]["peak_mib"] for turn in turns)
        anonymous = statistics.median(turn["peak_sampled_mib"]["RssAnon"] for turn in turns)
        row = [f"{n} clients", peak(turns), peak(turns) - base, anonymous, before]
        runs.append([*row, first["tokens_trained"], cohort])
        cached = "found" if made["store_was_cached"] else "made"
        cold.append([n, made["rows"], made["tokens"], cached, made["seconds"], made["peak_mib"]])
    head = ["process", "peak (VmHWM), MiB", "above the base", "allocated alone (RssAnon)"]
    head += ["peak before the round", "tokens trained"]
    made_head = ["clients", "rows", "tokens", "store", "seconds", "peak, MiB"]
    return [
        Table("One round, token store cached", [*head, "cohort"], runs),
        Table("Preparation in its own process before it", made_head, cold),
    ]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="rows; default: clients.parquet")
    parser.add_argument("--populations", type=int, nargs="+", default=[14, 140, 1400])
    parser.add_argument("--steps", type=int, default=2, help="optimiser steps of a client")
    parser.add_argument("--max-tokens", type=int, default=384)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--work", type=Path, help="where token stores are kept; default: made anew, then removed"
    )
    parser.add_argument(
        "--quick", action="store_true", help="9 and 12 clients, 1 step, once; no claim on memory"
    )
    parser.add_argument("--job", help=argparse.SUPPRESS)
    parser.add_argument("--clients", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.populations, options.steps, options.repeats = [9, 12], 1, 1
    if len(options.populations) < 2:
        parser.error("--populations needs two sizes or more, to be compared.")
    return options


def main() -> int:
    options = arguments()
    if options.job:
        jobs = {
            "base": lambda: base_only(options),
            "preparation": lambda: preparation(options, options.clients, options.work),
            "federation": lambda: federation(options, options.clients, options.work),
        }
        print(json.dumps(jobs[options.job]()))
        return 0
    data_file(options.data, "clients.parquet")
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
