"""What Ray's workers cost and gain: a call, a worker that dies, a second worker.

Calls that do nothing go through the same exchange as clients do: 100 to 10,000 of them, with one
download for all. A worker is killed in one of many such calls, and the calls that began are
counted. Rounds of the tiny model of ``growth.py`` are trained by one and by two workers of one
thread each, and in this process; all must give the same adapter.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import growth
import ray
import torch
from result import Claim, Table, data_file, finish, setting

from flexlora import config, rounds
from flexlora.client import Job
from flexlora.experiment import prepare
from flexlora.federation import Patience, Reply
from flexlora.federations.ray.cluster import cluster
from flexlora.federations.ray.crew import OnRay

DOWNLOAD_BYTES = 2**16
CALL_MS, GROWN, TURNS_LOST, FASTER = 2.0, 1.25, 1, 1.8
KILLER = "kills its worker"
IN_PROCESS = "in this process"


@dataclass(frozen=True)
class NoOp:
    """Calls that do nothing, but note that they began if there is a file to note it in.

    The client called ``KILLER`` ends its worker the first time.
    """

    notes: Path | None = None

    def __call__(self) -> Callable[[Iterable[Job]], list[bytes]]:
        """In a worker: an empty upload for each job."""
        return lambda jobs: [self.turn(job) for job in jobs]

    def turn(self, job: Job) -> bytes:
        """Nothing, or the end of the worker."""
        if self.notes is not None:
            before = self.notes.read_text() if self.notes.exists() else ""
            with self.notes.open("a") as notes:
                notes.write(f"{job.client}\n")
            if job.client == KILLER and KILLER not in before:
                os._exit(1)
        return b""


@contextmanager
def crew(options: argparse.Namespace, work: Path, build: NoOp) -> Iterator[OnRay]:
    """Workers that do nothing on a cluster of their own, called once before anything is timed."""
    settings = growth.experiment(growth.job(options, work, model="tiny", clients=1))
    with cluster(settings, options.workers) as found:
        held = OnRay(build, options.workers, {"num_cpus": 1}, scratch=found.scratch)
        try:
            list(held.exchange(jobs(work, [f"warm {n}" for n in range(20)]), Patience()))
            yield held
        finally:
            held.close()


def jobs(work: Path, clients: Iterable[str]) -> Iterator[Job]:
    """A job for each of these clients, with a download that all share."""
    download = work / "download"
    if not download.exists():
        download.write_bytes(os.urandom(DOWNLOAD_BYTES))
    return (Job(client, 1, download) for client in clients)


def calls(options: argparse.Namespace, work: Path) -> dict[str, list[dict[str, float]]]:
    """Milliseconds of a call, and of it this process's own, in exchanges of several sizes in turn.

    Raises:
        RuntimeError: a call was not answered.
    """
    found: dict[str, list[dict[str, float]]] = {str(size): [] for size in options.calls}
    with crew(options, work, NoOp()) as federation:
        for _ in range(options.repeats):
            for size in options.calls:
                started, own = time.perf_counter(), time.process_time()
                asked = jobs(work, (f"client-{n:06d}" for n in range(size)))
                answered = sum(
                    isinstance(reply, Reply) for reply in federation.exchange(asked, Patience())
                )
                if answered != size:
                    raise RuntimeError(f"{answered} of {size} calls were answered.")
                wall, own = time.perf_counter() - started, time.process_time() - own
                found[str(size)].append({"wall": 1e3 * wall / size, "own": 1e3 * own / size})
    return found


def death(options: argparse.Namespace, work: Path) -> dict[str, float]:
    """Exchanges with and without a death, in seconds, and how many turns began twice."""
    notes = work / "notes"
    with crew(options, work, NoOp(notes)) as federation:
        seconds = {}
        for name, killer in (("without", "kills nobody"), ("with", KILLER)):
            notes.write_text("")
            clients = [f"client-{n:06d}" for n in range(options.beside)]
            clients.insert(options.beside // 2, killer)
            started = time.perf_counter()
            replies = list(federation.exchange(jobs(work, clients), Patience()))
            seconds[name] = time.perf_counter() - started
            if sorted(reply.client for reply in replies) != sorted(clients):
                raise RuntimeError(f"{len(replies)} of {len(clients)} calls were answered.")
    began = notes.read_text().splitlines()
    return {
        "calls": len(clients),
        "began": len(began),
        "twice": len(began) - len(set(began)),
        "lost": len(clients) - sum(isinstance(reply, Reply) for reply in replies),
        "seconds_without": seconds["without"],
        "seconds_with": seconds["with"],
    }


def training(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Rounds by so many workers, and in this process, in turn; the first round is not counted."""
    size, alone = options.clients, argparse.Namespace(**{**vars(options), "threads": 1})
    source = data_file(options.data, "clients.parquet")
    growth.populations(source, [size], work)
    growth.tiny_model(work / "tiny", source)
    settings = growth.experiment(
        growth.job(alone, work, model="tiny", clients=size, cohort=size, rounds=options.rounds + 1)
    )
    training = replace(settings.training, epochs=options.epochs, max_steps=None)
    run = settings.run.model_copy(update={"clients_at_once": 1})
    settings = settings.model_copy(update={"run": run, "training": training})
    found: dict[str, list[dict[str, Any]]] = {}
    for repeat in range(options.repeats):
        for workers in (0, *options.compared):
            name = f"{workers} workers" if workers else IN_PROCESS
            folder = work / f"run {repeat}, {name}"
            found.setdefault(name, []).append(rounds_of(settings, workers, folder))
    return found


def rounds_of(settings: config.Experiment, workers: int, folder: Path) -> dict[str, Any]:
    """The rounds of one run, on workers or in this process."""
    ready = prepare(settings)
    if workers:
        with (
            cluster(settings, workers) as found,
            found.federation(ready, folder) as federation,
        ):
            events = list(rounds.run(ready, folder, federation))
    else:
        events = list(rounds.run(ready, folder))
    told = [event for event in events if event["event"] == "round"]
    adapter = Path(events[-1]["adapter"]) / "adapter_model.safetensors"
    return {
        "seconds": [event["seconds"] for event in told[1:]],
        "first_seconds": told[0]["seconds"],
        "aggregate_seconds": [event["aggregate_seconds"] for event in told[1:]],
        "tokens": [event["tokens"] for event in told[1:]],
        "adapter": hashlib.sha256(adapter.read_bytes()).hexdigest(),
    }


def median_round(turns: Sequence[dict[str, Any]], key: str = "seconds") -> float:
    return statistics.median(value for turn in turns for value in turn[key])


def claims_of(found: dict[str, Any], options: argparse.Namespace) -> list[Claim]:
    """Milliseconds a call and their growth, what a death costs, and what a second worker gains."""
    asserted = not options.quick
    each = {size: statistics.median(t["wall"] for t in of) for size, of in found["calls"].items()}
    small, large = (str(size) for size in (options.calls[0], options.calls[-1]))
    died = found["death"]
    trained = found["training"]
    one, most = (f"{workers} workers" for workers in (options.compared[0], options.compared[-1]))
    adapters = {turn["adapter"] for turns in trained.values() for turn in turns}
    gain = median_round(trained[one]) / median_round(trained[most])
    bound = FASTER * options.compared[-1] / options.compared[0] / 2
    return [
        Claim("ms a no-op call, the slowest size", max(each.values()), CALL_MS, False, asserted),
        Claim(
            f"ms a call of {large} clients over that of {small}",
            each[large] / each[small],
            GROWN,
            False,
            asserted,
        ),
        Claim("turns that began twice as a worker died", died["twice"], TURNS_LOST, False),
        Claim("clients lost as a worker died", died["lost"], 0, False),
        Claim(f"seconds of a round, {one} over {most}", gain, bound, True, asserted),
        Claim("different adapters of all runs", float(len(adapters)), 1, False),
    ]


def tables_of(found: dict[str, Any], options: argparse.Namespace) -> list[Table]:
    """Calls, the death, rounds."""
    called = [
        [size, *(statistics.median(turn[key] for turn in turns) for key in ("wall", "own"))]
        for size, turns in found["calls"].items()
    ]
    trained = [
        [
            name,
            median_round(turns),
            median_round(found["training"][IN_PROCESS]) / median_round(turns),
            median_round(turns, "aggregate_seconds"),
            statistics.median(turn["first_seconds"] for turn in turns),
        ]
        for name, turns in found["training"].items()
    ]
    died = found["death"]
    head = ["where", "round, s", "in this process / it", "of it aggregation", "first round, s"]
    return [
        Table(
            f"No-op calls, {options.workers} workers, one download of {DOWNLOAD_BYTES // 1024} KiB",
            ["clients", "ms a call", "of it this process's CPU"],
            called,
        ),
        Table(
            f"A worker killed in one of {died['calls']} calls",
            ["turns begun", "begun twice", "lost", "exchange, s", "without a death, s"],
            [[died[k] for k in ("began", "twice", "lost", "seconds_with", "seconds_without")]],
        ),
        Table(
            f"Rounds of {options.clients} clients, {options.epochs} epochs each, a thread a worker "
            "(the first loads the model)",
            head,
            trained,
        ),
    ]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="rows; default: clients.parquet")
    parser.add_argument("--calls", type=int, nargs="+", default=[100, 1000, 10_000])
    parser.add_argument("--workers", type=int, default=2, help="of the calls that do nothing")
    parser.add_argument("--beside", type=int, default=200, help="calls beside the one that kills")
    parser.add_argument("--clients", type=int, default=16, help="of a round, all of them")
    parser.add_argument("--epochs", type=int, default=4, help="of a client in a round")
    parser.add_argument("--rounds", type=int, default=3, help="after the first")
    parser.add_argument(
        "--compared", type=int, nargs="+", default=[1, 2], help="numbers of workers"
    )
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--quick", action="store_true", help="100 and 400 calls, 4 clients, 1 epoch, once"
    )
    options = parser.parse_args()
    if options.quick:
        options.calls, options.repeats, options.rounds = [100, 400], 1, 1
        options.clients, options.epochs = 4, 1
    return options


def main() -> int:
    options = arguments()
    place = setting(1)
    place["versions"]["ray"] = ray.__version__
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        found = {
            "calls": calls(options, work),
            "death": death(options, work),
            "training": training(options, work),
        }
    name = Path(__file__).stem + ("-quick" if options.quick else "")
    return finish(name, place, found, tables_of(found, options), claims_of(found, options))


if __name__ == "__main__":
    sys.exit(main())
