"""The server step against a dense one and PEFT's: time, memory and error, at real shapes.

The dense route is that of the paper's reference implementation: add up ``p_k B_k A_k`` one
client after another in float32, compute the full SVD of the sum, truncate it to each rank.
PEFT's is ``add_weighted_adapter(combination_type="svd")``. Ours is ``decompose``, exact and
bounded. Every measurement is a new process on the same seeded data, and contestants alternate.
Then whole rounds go through ``FlexLoRA.aggregate`` with uploads on the disk.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from result import Claim, Table, finish, setting, status_kib
from server_contestants import (
    Case,
    Cuts,
    Weighted,
    bounded,
    dense,
    federation,
    ours,
    peft_bytes,
)
from server_round import measure_round, round_jobs, round_title, write_uploads
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flexlora.lowrank.decomposition import TOLERANCE
from flexlora.lowrank.factors import Factors
from flexlora.lowrank.sums import LowRankSum, norm

ROUTES = {"exact": ours, "bounded": bounded, "dense": dense}
OURS = ("exact-float32", "exact-float64", "bounded-float32", "bounded-float64")
PEERS = ("dense-float32", "peft-float32")
MIXED = (8, 30, 30, 200)

FULL = [
    Case(4096, 4096, 20, MIXED),
    Case(4096, 4096, 80, (8,)),
    Case(4096, 11008, 20, MIXED),
    Case(4096, 11008, 80, (8,)),
    Case(4096, 4096, 20, MIXED, "flat"),
    Case(576, 576, 10, (8,)),
    Case(1536, 576, 20, MIXED),
    Case(1536, 576, 200, (8, 30)),
    Case(8192, 28672, 20, MIXED),
    Case(8192, 28672, 80, (8,)),
]
QUICK = [
    Case(512, in_, clients, ranks)
    for in_ in (512, 1376)
    for clients, ranks in ((20, (2, 4, 4, 24)), (80, (2,)))
] + [Case(512, 512, 20, (2, 4, 4, 24), "flat")]
VALIDATION = Case(1536, 1792, 20, MIXED)
QUICK_VALIDATION = Case(384, 448, 20, (2, 4, 4, 24))
"""A shape for which a dense SVD in float64 is affordable and the summed rank is still smaller."""

SPEEDUPS = {
    (FULL[0], "exact-float32"): 12.0,
    (FULL[0], "bounded-float32"): 36.0,
    (FULL[1], "exact-float32"): 25.0,
    (FULL[2], "exact-float32"): 12.0,
    (FULL[3], "exact-float32"): 100.0,
    (FULL[3], "bounded-float32"): 100.0,
}
"""The claimed ratio of the dense route's time to ours."""
ROUND_SECONDS = 60.0
MANY_CLIENTS_MIB = 2e9 / 2**20


def left_out(case: Case, contestant: str) -> str | None:
    """The reason why a contestant is not measured in this case, or None."""
    if contestant in OURS:
        return None
    hours = 40 * case.out * case.in_ * min(case.out, case.in_) / 180e9 / 3600
    if hours > 0.05:
        return f"left out: about {hours:.2f} hours a turn, estimated from its flops"
    if contestant.startswith("peft") and peft_bytes(case) > 12 * 2**30:
        return f"left out: it would hold {peft_bytes(case) / 2**30:.0f} GiB of dense matrices"
    return None


def error(got: Factors, optimum: Factors) -> float:
    """``|got - optimum| / |optimum|`` of the products in Frobenius norm, by QR in float64."""
    difference = LowRankSum.of([(1.0, got.to(torch.float64)), (-1.0, optimum)])
    return difference.norm() / norm(optimum)


def errors(case: Case, weighted: Weighted, cuts: Cuts) -> dict[str, Any]:
    """By rank: the distance from the float64 optimum, and the excess over its error."""
    svd = LowRankSum.of(weighted).svd(max(case.ranks))
    distance, excess = {}, {}
    for rank, factors in cuts.factors.items():
        distance[rank] = error(factors, svd.factors(rank))
        least = float(svd.S[rank:].square().sum().sqrt())
        rest = LowRankSum.of([*weighted, (-1.0, factors)])
        excess[rank] = rest.norm() / least - 1
    return {"errors": distance, "true_excess": excess}


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the largest tensor that any operation returns, and the number of SVDs."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.largest = 0
        self.svds = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and record its result's size."""
        result = func(*args, **(kwargs or {}))
        self.svds += "linalg_svd" in str(func)
        for item in result if isinstance(result, tuple | list) else [result]:
            if isinstance(item, Tensor):
                self.largest = max(self.largest, item.numel())
        return result


def peers() -> tuple[Any, Any]:
    """PEFT's merging, imported only where it is measured, so that others do not pay its memory."""
    import server_peft

    return server_peft.merged, server_peft.prepared


def measure(case: Case, contestant: str, options: argparse.Namespace, whole: bool) -> Any:
    """One contestant's turn in this process: seconds, peak memory, and optionally its error."""
    torch.set_num_threads(options.threads)
    name, _, precision = contestant.partition("-")
    route, prepared = peers() if name == "peft" else (ROUTES[name], lambda weighted: (weighted,))
    dtype: torch.dtype = getattr(torch, precision)
    # The libraries load their kernels and start their threads before the clock does.
    warm = Case(67, 71, 2, (3, 5))
    route(*prepared(federation(warm, options.seed)), warm.distinct, dtype)
    weighted = federation(case, options.seed)
    given = (*prepared(weighted), case.distinct, dtype)
    gc.collect()
    before = status_kib("VmRSS")
    started = time.perf_counter()
    cuts = route(*given)
    seconds = time.perf_counter() - started
    found: dict[str, Any] = {
        "seconds": seconds,
        "peak_rss_mib": status_kib("VmHWM") / 1024,
        "peak_increase_mib": (status_kib("VmHWM") - before) / 1024,
        "route": cuts.route,
        "excess": cuts.excess,
        "refused": None if cuts.refused is None else f"{cuts.refused:.1e}",
    }
    summed_rank = sum(case.client_ranks)
    if whole and contestant != "exact-float64" and summed_rank < min(case.out, case.in_):
        # The exact float64 route is the optimum itself; ``validate`` compares it with a dense SVD.
        found |= errors(case, weighted, cuts)
    if whole and name == "exact":
        with Watch() as watch:
            route(*given)
        found |= {"largest_tensor": watch.largest, "svds": watch.svds}
    return found


def validate(case: Case, options: argparse.Namespace) -> dict[str, float]:
    """The distance of our float64 route from a dense SVD in float64, by rank."""
    torch.set_num_threads(options.threads)
    weighted = federation(case, options.seed)
    exact = dense(weighted, case.distinct, torch.float64).factors
    got = ours(weighted, case.distinct, torch.float64).factors
    return {str(rank): error(got[rank], exact[rank]) for rank in case.distinct}


def in_process(job: dict[str, Any], options: argparse.Namespace) -> Any:
    """Run the job in a new process, so that the peak memory is only its own.

    Raises:
        RuntimeError: the process failed; its message is printed above.
    """
    common = ["--seed", str(options.seed), "--threads", str(options.threads)]
    command = [sys.executable, __file__, "--job", json.dumps(job), *common]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"This job failed, see its message above: {json.dumps(job)[:200]}")
    return json.loads(done.stdout)


def do_job(options: argparse.Namespace) -> Any:
    """The work of a process started by ``in_process``."""
    job = json.loads(options.job)
    if "round" in job:
        return measure_round(Path(job["folder"]), job["round"], options.threads)
    case = Case(**job["case"] | {"ranks": tuple(job["case"]["ranks"])})
    return measure(case, job["contestant"], options, job["whole"])


def run_case(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """All turns at one case, contestants alternating, with medians."""
    contestants = [c for c in (*OURS, *PEERS) if not left_out(case, c)]
    turns: dict[str, list[Any]] = {name: [] for name in contestants}
    for repeat in range(max(options.repeats, options.peer_repeats)):
        for name in contestants:
            if repeat < (options.repeats if name in OURS else options.peer_repeats):
                job = {"case": asdict(case), "contestant": name, "whole": repeat == 0}
                turns[name].append(in_process(job, options))
                seconds = turns[name][-1]["seconds"]
                print(f"{case.title}: {name} {seconds:.3f} s", file=sys.stderr)
    return {
        "case": asdict(case),
        "title": case.title,
        "summed_rank": sum(case.client_ranks),
        "median_seconds": {
            name: statistics.median(turn["seconds"] for turn in found)
            for name, found in turns.items()
        },
        "left_out": {name: left_out(case, name) for name in PEERS if left_out(case, name)},
        "turns": turns,
    }


def run_rounds(options: argparse.Namespace) -> dict[str, Any]:
    """The rounds of ``round_jobs``, each with newly written uploads."""
    found = {}
    with tempfile.TemporaryDirectory(dir=options.work) as work:
        for name, job in round_jobs(options.quick).items():
            folder = Path(work) / name.partition(",")[0].replace(" ", "-")
            write_uploads(folder, job, options.seed)
            found[name] = in_process({"round": job, "folder": str(folder)}, options)
            found[name] |= {"title": round_title(name, job), "precision": job["precision"]}
            print(f"{name}: {found[name]['seconds']:.1f} s", file=sys.stderr)
    return found


def claims_of(case: Case, found: dict[str, Any], quick: bool) -> list[Claim]:
    """The claims about one case."""
    seconds, turns = found["median_seconds"], found["turns"]
    title, claims = case.title, []
    for name in OURS:
        bound = SPEEDUPS.get((case, name))
        if "dense-float32" in seconds and bound is not None:
            ratio = seconds["dense-float32"] / seconds[name]
            claims.append(Claim(f"{title}, dense seconds / {name}", ratio, bound, at_least=True))
        if quick and "dense-float32" in seconds and name.endswith("32"):
            ratio = seconds["dense-float32"] / seconds[name]
            text = f"{title}, dense seconds / {name}"
            claims.append(Claim(text, ratio, 1.0, at_least=True, asserted=False))
        excess = turns[name][0].get("true_excess")
        if name.startswith("bounded") and excess:
            worst = max(excess.values())
            text = f"{title}, error of {name} above the optimum, as a share of it"
            claims.append(Claim(text, worst, TOLERANCE, at_least=False))
    first = turns["exact-float32"][0]
    if "errors" in first and case.spectrum == "decaying":
        worst = max(first["errors"].values())
        claims.append(Claim(f"{title}, error of exact-float32", worst, 1e-5, at_least=False))
    if first["route"] == "qr":
        share = first["largest_tensor"] / (case.out * case.in_)
        claims += [
            Claim(f"{title}, largest tensor made / (out x in)", share, 0.999, at_least=False),
            Claim(f"{title}, SVDs for all ranks", float(first["svds"]), 1, at_least=False),
        ]
    return claims


def round_claims(rounds: dict[str, Any], quick: bool) -> list[Claim]:
    """The claims about whole rounds."""
    whole, many = rounds["7B round, bounded"], rounds["many clients, bounded"]
    text = f"{whole['title']}, seconds of FlexLoRA.aggregate"
    peak = f"{many['title']}, peak memory of the process in MiB"
    return [
        Claim(text, whole["seconds"], ROUND_SECONDS, at_least=False, asserted=not quick),
        Claim(peak, many["peak_rss_mib"], MANY_CLIENTS_MIB, at_least=False),
    ]


def tables_of(cases: Sequence[dict[str, Any]], rounds: dict[str, Any]) -> list[Table]:
    """Times and memory, then errors by rank, then whole rounds."""
    rows, by_rank = [], []
    for found in cases:
        base = found["median_seconds"].get("dense-float32")
        for name, turns in found["turns"].items():
            seconds, title = found["median_seconds"][name], found["title"]
            memory = statistics.median(turn["peak_increase_mib"] for turn in turns)
            times = base / seconds if base else "-"
            route = turns[0]["route"]
            rows.append([title, name, route, len(turns), seconds, times, memory])
            if "errors" in turns[0]:
                shown = [_by_rank(turns[0][key]) for key in ("errors", "true_excess")]
                refused, excess = turns[0]["refused"], turns[0]["excess"]
                bound = "-" if excess is None else f"{excess:.1e}"
                bound += f" (krylov refused at {refused})" if refused is not None else ""
                by_rank.append([title, name, *shown, bound])
        for name, reason in found["left_out"].items():
            rows.append([found["title"], name, reason, 0, "-", "-", "-"])
    head = ["case", "contestant", "route", "turns", "median s", "times faster than dense"]
    shown_rounds = [
        [r["title"], r["precision"], r["seconds"], r["peak_rss_mib"], r["routes"], r["refused"]]
        for r in rounds.values()
    ]
    return [
        Table("Time and memory", [*head, "peak RSS above start, MiB"], rows),
        Table(
            "Error against the float64 optimum",
            ["case", "contestant", "distance by rank", "error above the optimum's", "bound shown"],
            by_rank,
        ),
        Table(
            "Rounds through FlexLoRA.aggregate, uploads on the disk",
            ["round", "precision", "seconds", "peak RSS, MiB", "modules by route", "refused"],
            shown_rounds,
        ),
    ]


def _by_rank(found: dict[str, float]) -> str:
    return ", ".join(f"{rank}: {value:.1e}" for rank, value in found.items())


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5, help="turns of our routes")
    parser.add_argument("--peer-repeats", type=int, default=1, help="turns of dense and PEFT")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, help="where 4 GB of uploads may lie for a while")
    parser.add_argument("--quick", action="store_true", help="small shapes; no claim on time")
    parser.add_argument("--rounds-only", action="store_true", help="leave out the single modules")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    options = arguments()
    if options.job:
        print(json.dumps(do_job(options)))
        return 0
    place = setting(options.threads)
    cases = [] if options.rounds_only else QUICK if options.quick else FULL
    small = QUICK_VALIDATION if options.quick else VALIDATION
    validation = validate(small, options)
    measured = [run_case(case, options) for case in cases]
    rounds = run_rounds(options)
    text = f"{small.title}, our float64 route against a dense float64 SVD"
    claims = [Claim(text, max(validation.values()), 1e-9, at_least=False)]
    for case, found in zip(cases, measured, strict=True):
        claims += claims_of(case, found, options.quick)
    claims += round_claims(rounds, options.quick)
    measurements = {"validation": {small.title: validation}, "cases": measured, "rounds": rounds}
    name = "-".join(
        [Path(__file__).stem, *["rounds"] * options.rounds_only, *["quick"] * options.quick]
    )
    return finish(name, place, measurements, tables_of(measured, rounds), claims)


if __name__ == "__main__":
    sys.exit(main())
