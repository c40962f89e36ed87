"""Rounds and server steps by one process, by Ray's workers, and by two independent processes.

Two independent single-threaded processes, each doing the whole work, show what the machine can
give: if each takes as long as a single process, two workers can be twice as fast. These are the
parts of ``ray_calls.py`` with real work; the script starts itself for measurements in a separate
process.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import growth
import torch
from result import data_file
from server_round import write_uploads

from flexlora import config, methods, wire
from flexlora.federation import rounds
from flexlora.federation.ray.cluster import cluster
from flexlora.federation.ray.pool import RayTransport
from flexlora.federation.setup import prepare
from flexlora.federation.transport import WaitPolicy
from flexlora.lowrank.factors import Adapter, Factors
from flexlora.method.averager import Cohort
from flexlora.method.averagers.plain import Plain
from flexlora.method.interface import RoundContext, State
from flexlora.model import smollm2
from flexlora.seeds import rng

KERNEL_SECONDS = 2.0
RANKS = (8, 16, 32, 64)


@contextmanager
def busy_cores() -> Iterator[list[float]]:
    """The average number of busy cores of the machine meanwhile, over all processes."""

    def busy() -> float:
        user, nice, system, _, _, *irqs = map(int, Path("/proc/stat").read_text().split()[1:8])
        return (user + nice + system + sum(irqs)) / 100

    found: list[float] = []
    before, started = busy(), time.perf_counter()
    yield found
    found.append((busy() - before) / (time.perf_counter() - started))


def at_once(*jobs: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Run each of these jobs in its own process; all begin together when all are prepared.

    Raises:
        RuntimeError: a job failed; its message is printed above.
    """
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    begun = [
        subprocess.Popen([sys.executable, __file__, json.dumps(job)], **pipes)  # type: ignore[call-overload]
        for job in jobs
    ]
    for process in begun:
        process.stdout.readline()
    for process in begun:
        process.stdin.write("\n")
        process.stdin.flush()
    told = [process.communicate()[0].splitlines() for process in begun]
    print(f"{len(jobs)} at once: {dict(jobs[0])}", file=sys.stderr)
    if any(process.returncode for process in begun):
        raise RuntimeError("A job failed; see its message above.")
    return [json.loads(lines[-1]) for lines in told]


def kernels(job: Mapping[str, Any]) -> Callable[[], dict[str, Any]]:
    """Calls per second of work that needs only the core, or the memory as well."""
    small, large = torch.randn(64, 64), torch.randn(1536, 1536)
    much = torch.randn(2**25)
    works: dict[str, Callable[[], object]] = {
        "products of 64 x 64": lambda: [small @ small for _ in range(100)],
        "a product of 1536 x 1536": lambda: large @ large,
        "a copy of 128 MiB": much.clone,
    }

    def rate(work: Callable[[], object]) -> float:
        work()
        calls, started = 0, time.perf_counter()
        while time.perf_counter() - started < KERNEL_SECONDS:
            work()
            calls += 1
        return calls / (time.perf_counter() - started)

    return lambda: {name: rate(work) for name, work in works.items()}


def settings_of(job: Mapping[str, Any]) -> config.Experiment:
    """The measured federation: the clients of a round train one at a time on one thread."""
    size = job["clients"]
    given = growth.job(
        argparse.Namespace(threads=1, max_tokens=job["max_tokens"]),
        Path(job["work"]),
        model=job["model"],
        clients=size,
        cohort=size,
        rounds=job["rounds"] + 1,
    )
    found = growth.experiment(given)
    training = replace(found.training, epochs=job["epochs"], max_steps=job["steps"])
    run = found.run.model_copy(update={"clients_at_once": 1})
    return found.model_copy(update={"run": run, "training": training})


def trained(job: Mapping[str, Any]) -> Callable[[], dict[str, Any]]:
    """Rounds in this process; the first is not counted."""
    ready = prepare(settings_of(job))
    return lambda: told_of(rounds.run(ready, Path(job["folder"])), 1)


def on_workers(job: Mapping[str, Any], workers: int, folder: Path) -> dict[str, Any]:
    """The same rounds by workers."""
    settings = settings_of(job)
    ready = prepare(settings)
    with cluster(settings, workers) as found, found.federation(ready, folder) as federation:
        return told_of(rounds.run(ready, folder, federation), workers)


def told_of(events: Iterable[dict[str, Any]], workers: int) -> dict[str, Any]:
    """The rounds after the first, and how their time was spent, from the journal."""
    seen = []
    for event in events:
        seen.append(event)
        if event["event"] == "spectrum" and event["round"] == 1:
            break
    with busy_cores() as busy:
        seen += events
    told = [event for event in seen if event["event"] == "round"]
    starts = [event["time"] - event["seconds"] for event in told] + [seen[-1]["time"]]
    adapter = Path(seen[-1]["adapter"]) / "adapter_model.safetensors"
    return {
        "first_seconds": told[0]["seconds"],
        "rounds": [
            phases(seen, event, end, workers)
            for event, end in zip(told[1:], starts[2:], strict=True)
        ],
        "busy_cores": busy[0],
        "adapter": hashlib.sha256(adapter.read_bytes()).hexdigest(),
    }


def phases(
    seen: Sequence[dict[str, Any]], told: dict[str, Any], end: float, workers: int
) -> dict[str, float]:
    """A round's seconds, until the next one begins, by activity.

    Training is summed over the workers; at the end each worker waits for the last one.
    """
    start = told["time"] - told["seconds"]
    clients = [e for e in seen if e["event"] == "client" and e["round"] == told["round"]]
    answered = sorted(event["time"] for event in clients)
    asking = answered[-1] - start
    turns = sum(event["seconds"] for event in clients) / workers
    waiting = sum(answered[-1] - time for time in answered[-workers:]) / workers
    return {
        "seconds": end - start,
        "turns": turns,
        "waiting for the last": waiting,
        "handout, transfer, checks": asking - turns - waiting,
        "server step": told["aggregate_seconds"],
        "export, spectrum, checkpoint": end - start - asking - told["aggregate_seconds"],
    }


def training(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Rounds of the tiny model, and one of SmolLM2-135M, by all contestants alternately.

    Raises:
        ValueError: there is no training data.
    """
    source = data_file(options.data, "clients.parquet")
    plan: dict[str, dict[str, Any]] = {
        "tiny": {"clients": options.clients, "epochs": options.epochs, "steps": None}
        | {"rounds": options.rounds, "repeats": options.repeats, "compared": options.compared},
    }
    if options.smollm2_clients:
        smollm2.folder()  # converted here if need be, not in a process that is measured
        plan["smollm2"] = {"clients": options.smollm2_clients, "epochs": 1, "steps": 1}
        plan["smollm2"] |= {"rounds": 1, "repeats": 1, "compared": [options.compared[-1]]}
    growth.populations(source, [case["clients"] for case in plan.values()], work)
    growth.tiny_model(work / "tiny", source)
    found: dict[str, Any] = {}
    for model, case in plan.items():
        job = case | {"kind": "trained", "model": model, "work": str(work)}
        job |= {"max_tokens": options.max_tokens}
        found[model] = contest(job, case, work)
    return found


def contest(
    job: Mapping[str, Any], case: Mapping[str, Any], work: Path
) -> dict[str, list[dict[str, Any]]]:
    """One process, workers, and two independent processes, alternately."""
    found: dict[str, list[dict[str, Any]]] = {}
    for repeat in range(case["repeats"]):

        def place(name: str, repeat: int = repeat) -> str:
            return str(work / f"{job['model']} {repeat} {name}")

        found.setdefault("one process", []).extend(at_once({**job, "folder": place("alone")}))
        for workers in case["compared"]:
            turn = on_workers(job, workers, Path(place(f"{workers} workers")))
            found.setdefault(f"{workers} workers", []).append(turn)
        both = [{**job, "folder": place(f"beside {n}")} for n in "ab"]
        found.setdefault("two processes at once", []).extend(at_once(*both))
    return found


def smollm2_shapes(layers: int = 30) -> dict[str, tuple[int, int]]:
    """SmolLM2-135M's linear layers, (out, in)."""
    kinds = dict.fromkeys(("q_proj", "o_proj"), (576, 576))
    kinds |= dict.fromkeys(("k_proj", "v_proj"), (192, 576))
    kinds |= {"gate_proj": (1536, 576), "up_proj": (1536, 576), "down_proj": (576, 1536)}
    return {f"layers.{i}.{kind}": shape for i in range(layers) for kind, shape in kinds.items()}


def step_of(job: Mapping[str, Any]) -> tuple[Any, State, Cohort, RoundContext]:
    """A method, the state before the step, the uploads on the disk, and the round's context."""
    shapes = smollm2_shapes(job["layers"])
    start = {}
    for module, (out, in_) in shapes.items():
        nothing = Factors(torch.zeros(out, 0), torch.zeros(0, in_))
        start[module] = nothing.widened(max(RANKS), rng(0, module))
    method, folder = methods.make(job["method"]), Path(job["folder"])
    context = RoundContext(1, 0, shapes, dict.fromkeys(shapes, max(RANKS)))
    uploads = [wire.open_upload(path) for path in sorted(folder.glob("*.safetensors"))]
    cohort = Plain().cohort(uploads, method.weights, context)
    return method, method.start(Adapter(start), context), cohort, context


def stepped(job: Mapping[str, Any]) -> Callable[[], dict[str, Any]]:
    """Server steps in this process; the first is not counted."""
    torch.set_num_threads(1)
    method, *step = step_of(job)
    return lambda: timed(lambda: method.aggregate(*step), job["repeats"])


def timed(work: Callable[[], State], repeats: int) -> dict[str, Any]:
    """Seconds of each step after the first, and a hash of its result."""
    work()
    seconds = []
    with busy_cores() as busy:
        for _ in range(repeats):
            started = time.perf_counter()
            state = work()
            seconds.append(time.perf_counter() - started)
    digest = hashlib.sha256()
    for f in state.model.values():
        digest.update(f.B.contiguous().numpy())
        digest.update(f.A.contiguous().numpy())
    return {"seconds": seconds, "busy_cores": busy[0], "adapter": digest.hexdigest()}


def idle() -> Callable[[Iterable[Any]], list[bytes]]:
    """The resident state of workers of server steps: none."""
    return lambda jobs: []


def steps(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Server steps over uploads of mixed ranks at SmolLM2-135M's shapes."""
    layers, clients = options.layers, 8 if options.quick else 24
    folder = work / "uploads"
    shapes = {"shapes": smollm2_shapes(layers), "clients": clients, "files": clients}
    write_uploads(folder, shapes | {"ranks": RANKS}, 0)
    found: dict[str, Any] = {}
    workers = options.compared[-1]
    with cluster(settings_of_nothing(), workers) as place:
        crew = RayTransport(idle, workers, {"num_cpus": 1}, scratch=place.scratch)
        list(crew.exchange([], WaitPolicy()))
        torch.set_num_threads(1)
        for name in options.methods:
            job = {"kind": "stepped", "method": name, "folder": str(folder), "layers": layers}
            job |= {"repeats": options.repeats}
            method, *step = step_of(job)

            def shared(method: Any = method, step: Any = step) -> State:
                return crew.aggregate(method, *step)

            found[name] = {
                "one process": at_once(job),
                f"{workers} workers": [timed(shared, options.repeats)],
                "two processes at once": at_once(job, job),
            }
        crew.close()
    return found


def settings_of_nothing() -> config.Experiment:
    """The settings that a cluster needs: one thread for each worker, no GPU."""
    options = argparse.Namespace(threads=1, max_tokens=96)
    return growth.experiment(growth.job(options, Path(), model="tiny", clients=1))


def median(turns: Sequence[dict[str, Any]], phase: str = "seconds") -> float:
    """The median over all rounds of all turns."""
    return statistics.median(told[phase] for turn in turns for told in turn["rounds"])


def seconds_of(turn: Mapping[str, Any]) -> list[float]:
    """The values of each round or server step of one contestant's turn."""
    if "rounds" in turn:
        return [told["seconds"] for told in turn["rounds"]]
    return list(turn["seconds"])


def main() -> int:
    job = json.loads(sys.argv[1])
    work = {"trained": trained, "stepped": stepped, "kernels": kernels}[job["kind"]](job)
    if job["kind"] == "kernels":
        torch.set_num_threads(1)
    print("prepared", flush=True)
    sys.stdin.readline()
    print(json.dumps(work()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
