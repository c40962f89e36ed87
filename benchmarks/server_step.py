"""The server's step, factored against dense: time, memory and error at LLaMA-7B's shapes.

The dense route is that of the paper's reference implementation: add up ``p_k B_k A_k`` one
client after another in float32, take the full SVD of the sum, cut it to each rank. Ours is
``LowRankSum.of(...).svd(largest rank)`` and ``factors(rank)``. Every measurement is a fresh
process on the same seeded data, and contestants alternate.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from result import Claim, Table, finish, setting, status_kib
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flexlora.adapter import Factors
from flexlora.linalg import LowRankSum, norm
from flexlora.seeds import rng

CONTESTANTS = ("ours-float32", "ours-float64", "dense-float32")
SPEEDUP = {20: 10.0, 80: 25.0}
"""The claimed ratio of times, by the number of clients."""


@dataclass(frozen=True)
class Case:
    """One module's shape and one federation's ranks, equal shares of each."""

    out: int
    in_: int
    clients: int
    ranks: tuple[int, ...]

    @property
    def client_ranks(self) -> list[int]:
        """The rank of every client."""
        return list(self.ranks) * (self.clients // len(self.ranks))

    @property
    def distinct(self) -> list[int]:
        """The ranks that the aggregate is cut to."""
        return sorted(set(self.ranks))

    @property
    def title(self) -> str:
        """Its name in the tables."""
        ranks = "/".join(map(str, self.ranks))
        return f"{self.out}x{self.in_}, {self.clients} clients of rank {ranks}"


FULL = [
    Case(out, in_, clients, ranks)
    for out, in_ in ((4096, 4096), (4096, 11008))
    for clients, ranks in ((20, (8, 30, 30, 200)), (80, (8,)))
]
QUICK = [
    Case(512, in_, clients, ranks)
    for in_ in (512, 1376)
    for clients, ranks in ((20, (2, 4, 4, 24)), (80, (2,)))
]
VALIDATION = Case(1536, 1792, 20, (8, 30, 30, 200))
QUICK_VALIDATION = Case(384, 448, 20, (2, 4, 4, 24))
"""Where a dense SVD in float64 is affordable and the summed rank still below the shape."""


def federation(case: Case, seed: int) -> list[tuple[float, Factors]]:
    """Weighted factors of all clients, float32: a shared signal and noise of their own.

    All share the leading directions of one signal, whose spectrum falls as i^-0.7, and a
    client of rank r holds the first r of them; its noise has the same spectrum at three
    tenths of the size. An orthogonal turn (B R, R' A) hides the alignment, as training does.
    Weights are numbers of examples, 16 to 520, as in Natural Instructions.
    """
    draw = rng(seed, "factors", case.out, case.in_, case.clients)
    top = max(case.ranks)

    def gaussian(rows: int, columns: int, scale: float) -> Tensor:
        return torch.from_numpy(draw.standard_normal((rows, columns)) * scale)

    root = torch.arange(1, top + 1, dtype=torch.float64) ** -0.35
    U, V = gaussian(case.out, top, case.out**-0.5), gaussian(case.in_, top, case.in_**-0.5)
    examples = draw.integers(16, 521, case.clients)
    weighted = []
    for share, rank in zip(examples / examples.sum(), case.client_ranks, strict=True):
        B = (U[:, :rank] + gaussian(case.out, rank, 0.3 * case.out**-0.5)) * root[:rank]
        A = (V[:, :rank] + gaussian(case.in_, rank, 0.3 * case.in_**-0.5)) * root[:rank]
        turn = torch.linalg.qr(gaussian(rank, rank, 1.0)).Q
        weighted.append((float(share), Factors((B @ turn).float(), (A @ turn).float().T)))
    return weighted


def ours(
    weighted: list[tuple[float, Factors]], ranks: Sequence[int], dtype: torch.dtype
) -> dict[int, Factors]:
    """One factored SVD, then a cut to each rank."""
    svd = LowRankSum.of(weighted).svd(max(ranks), dtype)
    return {rank: svd.factors(rank) for rank in ranks}


def dense(
    weighted: list[tuple[float, Factors]], ranks: Sequence[int], dtype: torch.dtype
) -> dict[int, Factors]:
    """The full matrix and its full SVD, as the reference implementation takes them."""
    first = weighted[0][1]
    W = torch.zeros(first.shape, dtype=dtype)
    for share, factors in weighted:
        W += share * (factors.B.to(dtype) @ factors.A.to(dtype))
    U, S, Vt = torch.linalg.svd(W, full_matrices=False)
    return {rank: Factors(U[:, :rank] * S[:rank], Vt[:rank]) for rank in ranks}


Route = Callable[[list[tuple[float, Factors]], Sequence[int], torch.dtype], dict[int, Factors]]


def error(got: Factors, optimum: Factors) -> float:
    """``|got - optimum| / |optimum|`` of the products in Frobenius norm, by QR in float64."""
    difference = LowRankSum.of([(1.0, got.to(torch.float64)), (-1.0, optimum)])
    return difference.norm() / norm(optimum)


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The largest tensor that any operation returns, and how many SVDs are taken."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.largest = 0
        self.svds = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and look at what it returns."""
        result = func(*args, **(kwargs or {}))
        self.svds += "linalg_svd" in str(func)
        for item in result if isinstance(result, tuple | list) else [result]:
            if isinstance(item, Tensor):
                self.largest = max(self.largest, item.numel())
        return result


def measure(case: Case, contestant: str, seed: int, threads: int, errors: bool) -> dict[str, Any]:
    """One contestant's turn in this process: seconds, peak memory, and once also its error."""
    torch.set_num_threads(threads)
    name, _, precision = contestant.partition("-")
    route: Route = {"ours": ours, "dense": dense}[name]
    dtype: torch.dtype = getattr(torch, precision)
    weighted = federation(case, seed)
    # The libraries load their kernels and start their threads before the clock does.
    warm = Case(67, 71, 2, (3, 5))
    route(federation(warm, seed), warm.distinct, dtype)
    gc.collect()
    before = status_kib("VmRSS")
    started = time.perf_counter()
    cuts = route(weighted, case.distinct, dtype)
    seconds = time.perf_counter() - started
    found: dict[str, Any] = {
        "seconds": seconds,
        "rss_before_mib": before / 1024,
        "peak_rss_mib": status_kib("VmHWM") / 1024,
        "peak_increase_mib": (status_kib("VmHWM") - before) / 1024,
    }
    if errors and dtype != torch.float64:
        # Our float64 route is the optimum itself; ``validate`` holds it to a dense SVD.
        optimum = ours(weighted, case.distinct, torch.float64)
        found["errors"] = {str(rank): error(cuts[rank], optimum[rank]) for rank in cuts}
    if errors and name == "ours":
        with Watch() as watch:
            ours(weighted, case.distinct, dtype)
        found |= {"largest_tensor": watch.largest, "svds": watch.svds}
    return found


def validate(case: Case, seed: int, threads: int) -> dict[str, float]:
    """Our float64 route against a dense SVD in float64, by rank."""
    torch.set_num_threads(threads)
    weighted = federation(case, seed)
    exact = dense(weighted, case.distinct, torch.float64)
    got = ours(weighted, case.distinct, torch.float64)
    return {str(rank): error(got[rank], exact[rank]) for rank in case.distinct}


def in_process(case: Case, contestant: str, options: argparse.Namespace, errors: bool) -> Any:
    """``measure`` in a fresh process, so that its peak memory is its own.

    Raises:
        RuntimeError: the process failed; what it said stands above.
    """
    job = {"case": asdict(case), "contestant": contestant, "errors": errors}
    common = ["--seed", str(options.seed), "--threads", str(options.threads)]
    command = [sys.executable, __file__, "--job", json.dumps(job), *common]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{contestant} failed on {case.title}; see its message above.")
    return json.loads(done.stdout)


def run_case(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """All turns at one case, contestants alternating, with medians."""
    repeats = {name: options.repeats for name in CONTESTANTS}
    repeats["dense-float32"] = options.dense_repeats
    turns: dict[str, list[Any]] = {name: [] for name in CONTESTANTS}
    for repeat in range(max(repeats.values())):
        for name in CONTESTANTS:
            if repeat < repeats[name]:
                found = in_process(case, name, options, errors=repeat == 0)
                turns[name].append(found)
                print(f"{case.title}: {name} {found['seconds']:.3f} s", file=sys.stderr)
    median = {
        name: statistics.median(turn["seconds"] for turn in found) for name, found in turns.items()
    }
    return {
        "case": asdict(case),
        "title": case.title,
        "summed_rank": sum(case.client_ranks),
        "median_seconds": median,
        "turns": turns,
    }


def claims_of(case: Case, found: dict[str, Any], quick: bool) -> list[Claim]:
    """What is claimed of one case."""
    seconds, first = found["median_seconds"], found["turns"]["ours-float32"][0]
    ratio = seconds["dense-float32"] / seconds["ours-float32"]
    share = first["largest_tensor"] / (case.out * case.in_)
    worst = max(first["errors"].values())
    title = case.title
    return [
        Claim(
            f"{title}, dense seconds / ours, both float32",
            ratio,
            SPEEDUP[case.clients],
            at_least=True,
            asserted=not quick,
        ),
        Claim(f"{title}, error of ours in float32", worst, 1e-5, at_least=False),
        Claim(f"{title}, largest tensor made / (out x in)", share, 0.999, at_least=False),
        Claim(f"{title}, SVDs for all ranks", float(first["svds"]), 1, at_least=False),
    ]


def tables_of(cases: Sequence[dict[str, Any]]) -> list[Table]:
    """Times and memory, then errors by rank."""
    rows, errors = [], []
    for found in cases:
        base = found["median_seconds"]["dense-float32"]
        for name, turns in found["turns"].items():
            seconds = found["median_seconds"][name]
            memory = statistics.median(turn["peak_increase_mib"] for turn in turns)
            peak = statistics.median(turn["peak_rss_mib"] for turn in turns)
            rows.append([found["title"], name, len(turns), seconds, base / seconds, memory, peak])
            if "errors" in turns[0]:
                by_rank = ", ".join(f"{r}: {e:.1e}" for r, e in turns[0]["errors"].items())
                errors.append([found["title"], name, by_rank])
    head = ["case", "route", "turns", "median s", "times faster than dense"]
    return [
        Table("Time and memory", [*head, "peak RSS above start, MiB", "peak RSS, MiB"], rows),
        Table("Error against the float64 optimum", ["case", "route", "by rank"], errors),
    ]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3, help="turns of our routes")
    parser.add_argument("--dense-repeats", type=int, default=1, help="turns of the dense route")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="small shapes; no claim on time")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    options = arguments()
    if options.job:
        job = json.loads(options.job)
        job["case"]["ranks"] = tuple(job["case"]["ranks"])
        case, seed = Case(**job["case"]), options.seed
        found = measure(case, job["contestant"], seed, options.threads, job["errors"])
        print(json.dumps(found))
        return 0
    place = setting(options.threads)
    cases = QUICK if options.quick else FULL
    small = QUICK_VALIDATION if options.quick else VALIDATION
    validation = validate(small, options.seed, options.threads)
    measured = [run_case(case, options) for case in cases]
    claims = [
        Claim(
            f"{small.title}, our float64 route against a dense float64 SVD",
            max(validation.values()),
            1e-9,
            at_least=False,
        )
    ]
    for case, found in zip(cases, measured, strict=True):
        claims += claims_of(case, found, options.quick)
    measurements = {"validation": {small.title: validation}, "cases": measured}
    name = Path(__file__).stem + ("-quick" if options.quick else "")
    return finish(name, place, measurements, tables_of(measured), claims)


if __name__ == "__main__":
    sys.exit(main())
