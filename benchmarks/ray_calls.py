"""The cost and gain of Ray's workers: of a call, of a worker that dies, of a second worker.

Calls that do nothing use the same exchange as clients: 100 to 10,000 of them, with one download
for all. A worker is killed during one of many such calls, and the calls that began are counted.
Rounds of the tiny model of ``growth.py`` and of SmolLM2-135M, and server steps at its shapes, are
computed by one process, by workers, and by two independent processes at once, which show what the
machine can give (``ray_rounds.py``). One thread each; all must give the same adapter.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray_rounds
from result import Claim, Table, finish, setting

from flexlora.federation.client_turn import TurnRequest
from flexlora.federation.ray.cluster import cluster
from flexlora.federation.ray.pool import RayTransport
from flexlora.federation.transport import Reply, WaitPolicy

DOWNLOAD_BYTES = 2**16
CALL_MS, GROWN, TURNS_LOST = 2.0, 1.25, 1
FASTER, OF_CEILING = 1.8, 0.95
"""The gain of two workers over one process, and relative to two independent processes."""
KILLER = "kills its worker"
ALONE, BOTH = "one process", "two processes at once"


@dataclass(frozen=True)
class NoOp:
    """Calls that do nothing except record their start in a file, if there is one.

    The client ``KILLER`` ends its worker in its first call.
    """

    notes: Path | None = None

    def __call__(self) -> Callable[[Iterable[TurnRequest]], list[bytes]]:
        """In a worker: an empty upload for each job."""
        return lambda jobs: [self.turn(job) for job in jobs]

    def turn(self, job: TurnRequest) -> bytes:
        """Nothing, or the end of the worker."""
        if self.notes is not None:
            before = self.notes.read_text() if self.notes.exists() else ""
            with self.notes.open("a") as notes:
                notes.write(f"{job.client}\n")
            if job.client == KILLER and KILLER not in before:
                os._exit(1)
        return b""


@contextmanager
def crew(options: argparse.Namespace, work: Path, build: NoOp) -> Iterator[RayTransport]:
    """Idle workers on a separate cluster, each called once before the measurement."""
    settings = ray_rounds.settings_of_nothing()
    with cluster(settings, options.workers) as found:
        held = RayTransport(build, options.workers, {"num_cpus": 1}, scratch=found.scratch)
        try:
            list(held.exchange(jobs(work, [f"warm {n}" for n in range(20)]), WaitPolicy()))
            yield held
        finally:
            held.close()


def jobs(work: Path, clients: Iterable[str]) -> Iterator[TurnRequest]:
    """A job for each of these clients, with one shared download."""
    download = work / "download"
    if not download.exists():
        download.write_bytes(os.urandom(DOWNLOAD_BYTES))
    return (TurnRequest(client, 1, download) for client in clients)


def calls(options: argparse.Namespace, work: Path) -> dict[str, list[dict[str, float]]]:
    """Milliseconds per call, in total and in this process, for exchanges of several sizes.

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
                    isinstance(reply, Reply) for reply in federation.exchange(asked, WaitPolicy())
                )
                if answered != size:
                    raise RuntimeError(f"{answered} of {size} calls were answered.")
                wall, own = time.perf_counter() - started, time.process_time() - own
                found[str(size)].append({"wall": 1e3 * wall / size, "own": 1e3 * own / size})
    return found


def death(options: argparse.Namespace, work: Path) -> dict[str, float]:
    """Seconds of exchanges with and without a killed worker, and the calls that began twice."""
    notes = work / "notes"
    with crew(options, work, NoOp(notes)) as federation:
        seconds = {}
        for name, killer in (("without", "kills nobody"), ("with", KILLER)):
            notes.write_text("")
            clients = [f"client-{n:06d}" for n in range(options.beside)]
            clients.insert(options.beside // 2, killer)
            started = time.perf_counter()
            replies = list(federation.exchange(jobs(work, clients), WaitPolicy()))
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


def claims_of(found: dict[str, Any], options: argparse.Namespace) -> list[Claim]:
    """The claims about milliseconds per call, the cost of a death, and the gain of workers."""
    asserted = not options.quick
    each = {size: statistics.median(t["wall"] for t in of) for size, of in found["calls"].items()}
    small, large = (str(size) for size in (options.calls[0], options.calls[-1]))
    died = found["death"]
    claims = [
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
    ]
    most = f"{options.compared[-1]} workers"
    for kind, text in (("training", "a round"), ("steps", "a server step")):
        for name, turns in found[kind].items():
            gain, ceiling = gain_of(turns, most), gain_of(turns, BOTH)
            what = f"{name}: seconds of {text}, {ALONE} over {most}"
            if kind == "training":
                claims.append(Claim(what, gain, FASTER, True, asserted))
            share = f"{what}, as a share of what the machine gives two processes"
            claims.append(Claim(share, gain / ceiling, OF_CEILING, True, asserted))
            adapters = {turn["adapter"] for of in turns.values() for turn in of}
            claims.append(Claim(f"{name}: different adapters", float(len(adapters)), 1, False))
    return claims


def seconds_of(turns: list[dict[str, Any]]) -> float:
    """The median round or server step."""
    return statistics.median(s for turn in turns for s in ray_rounds.seconds_of(turn))


def gain_of(found: dict[str, list[dict[str, Any]]], name: str) -> float:
    """The work of a contestant in the time that one process needs for its own."""
    works = len(found[BOTH]) // len(found[ALONE]) if name == BOTH else 1
    return works * seconds_of(found[ALONE]) / seconds_of(found[name])


def tables_of(found: dict[str, Any], options: argparse.Namespace) -> list[Table]:
    """Tables of calls, the death, the machine, rounds and their time, and server steps."""
    called = [
        [size, *(statistics.median(turn[key] for turn in turns) for key in ("wall", "own"))]
        for size, turns in found["calls"].items()
    ]
    died, kernels = found["death"], found["kernels"]
    machine = [
        [name, one, sum(both[name] for both in kernels[BOTH]) / one]
        for name, one in kernels[ALONE][0].items()
    ]
    busy = "cores busy on the machine"
    trained, where, stepped = [], [], []
    for kind, rows in (("training", trained), ("steps", stepped)):
        for model, contestants in found[kind].items():
            for name, turns in contestants.items():
                cores = statistics.median(turn["busy_cores"] for turn in turns)
                gain = gain_of(contestants, name)
                rows.append([model, name, seconds_of(turns), gain, cores])
                if kind == "training":
                    phases = list(turns[0]["rounds"][0])[1:]
                    each = [ray_rounds.median(turns, phase) for phase in phases]
                    where.append([model, name, *each])
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
            "What the machine gives two processes of one thread",
            ["work", "calls a second of one process", "of two at once, over that"],
            machine,
        ),
        Table(
            f"Rounds ({options.clients} clients of {options.epochs} epochs; SmolLM2-135M "
            f"{options.smollm2_clients} of one step), a thread each, the first not counted",
            ["model", "by", "round, s", "work over one process's", busy],
            trained,
        ),
        Table(
            "Where their seconds go (turns: their sum over the workers)",
            ["model", "by", *phases],
            where,
        ),
        Table(
            f"Server steps, uploads of ranks 8 to 64, {options.layers} layers of SmolLM2-135M's "
            "shapes, a thread each",
            ["method", "by", "step, s", "work over one process's", busy],
            stepped,
        ),
    ]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="rows; default: clients.parquet")
    parser.add_argument("--calls", type=int, nargs="+", default=[100, 1000, 10_000])
    parser.add_argument("--workers", type=int, default=2, help="of the calls that do nothing")
    parser.add_argument("--beside", type=int, default=200, help="calls beside the one that kills")
    parser.add_argument("--clients", type=int, default=32, help="of a round, all of them")
    parser.add_argument("--smollm2-clients", type=int, default=8, help="0 leaves the model out")
    parser.add_argument("--epochs", type=int, default=2, help="of a client in a round")
    parser.add_argument("--layers", type=int, default=30, help="of SmolLM2's, in a server step")
    parser.add_argument("--methods", nargs="+", default=["flexlora", "replication"])
    parser.add_argument("--rounds", type=int, default=3, help="after the first")
    parser.add_argument(
        "--compared", type=int, nargs="+", default=[1, 2], help="numbers of workers"
    )
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--quick", action="store_true", help="100 and 400 calls, 4 clients, 1 epoch, 2 layers, once"
    )
    options = parser.parse_args()
    if options.quick:
        options.calls, options.repeats, options.rounds = [100, 400], 1, 1
        options.clients, options.epochs, options.smollm2_clients, options.layers = 4, 1, 0, 2
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
            "kernels": {
                ALONE: ray_rounds.at_once({"kind": "kernels"}),
                BOTH: ray_rounds.at_once({"kind": "kernels"}, {"kind": "kernels"}),
            },
            "training": ray_rounds.training(options, work),
            "steps": ray_rounds.steps(options, work),
        }
    name = Path(__file__).stem + ("-quick" if options.quick else "")
    return finish(name, place, found, tables_of(found, options), claims_of(found, options))


if __name__ == "__main__":
    sys.exit(main())
