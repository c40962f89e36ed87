"""Whole rounds through ``FlexLoRA.aggregate``: uploads on the disk, opened lazily.

Run by ``server_step.py``, each in a separate process.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from result import status_kib
from server_contestants import Case

from flexlora import wire
from flexlora.lowrank.factors import Adapter, Factors
from flexlora.method.averagers.plain import Plain
from flexlora.method.interface import RoundContext, Upload
from flexlora.methods.flexlora import FlexLoRA
from flexlora.seeds import rng


def shapes_7b(layers: int) -> dict[str, tuple[int, int]]:
    """The linear layers of LLaMA-7B, (out, in)."""
    wide, narrow = 11008, 4096
    kinds = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), (narrow, narrow))
    kinds |= {"gate_proj": (wide, narrow), "up_proj": (wide, narrow), "down_proj": (narrow, wide)}
    return {f"layers.{i}.{kind}": shape for i in range(layers) for kind, shape in kinds.items()}


def round_jobs(quick: bool) -> dict[str, dict[str, Any]]:
    """The measured rounds: a whole 7B model, and 2,000 clients with one of its modules."""
    module = {"layers.0.down_proj": (512, 1376) if quick else (4096, 11008)}
    many = {"shapes": module, "clients": 200 if quick else 2000, "files": 20 if quick else 80}
    whole = {"shapes": shapes_7b(1 if quick else 32), "ranks": [8], "precision": "float32"}
    whole |= {"clients": 4 if quick else 80, "files": 4 if quick else 80}
    return {
        "7B round, bounded": whole | {"accuracy": "bounded"},
        "7B round, exact": whole | {"accuracy": "exact"},
        "many clients, bounded": many
        | {"ranks": [8, 30, 100, 200], "precision": "float32", "accuracy": "bounded"},
    }


def write_uploads(folder: Path, job: Mapping[str, Any], seed: int) -> None:
    """Uploads as clients send them, in bfloat16; beyond ``files`` they are hard links.

    A shared signal and each client's noise, as in ``federation``, without the rotation.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(job["clients"]):
        target = folder / f"{number:05d}.safetensors"
        if target.exists():
            continue
        if number >= job["files"]:
            target.hardlink_to(folder / f"{number % job['files']:05d}.safetensors")
            continue
        rank = job["ranks"][number % len(job["ranks"])]
        modules = {
            name: _factors(name, tuple(shape), rank, number, seed)
            for name, shape in job["shapes"].items()
        }
        examples = int(rng(seed, "examples", number).integers(16, 521))
        upload = Upload(f"client{number}", 1, Adapter(modules), examples)
        partial = target.with_suffix(".partial")
        partial.write_bytes(wire.encode_upload(upload, torch.bfloat16))
        partial.rename(target)


def _factors(name: str, shape: tuple[int, int], rank: int, number: int, seed: int) -> Factors:
    def gaussian(rows: int, *address: str | int) -> torch.Tensor:
        draw = rng(seed, name, *address)
        return torch.from_numpy(draw.standard_normal((rank, rows), dtype="float32")) * rows**-0.5

    root = torch.arange(1, rank + 1)[:, None] ** -0.35
    B, A = (
        (gaussian(rows, side, "signal") + 0.3 * gaussian(rows, side, number)) * root
        for side, rows in zip("BA", shape, strict=True)
    )
    return Factors(B.T, A)


def _opened(folder: Path, job: Mapping[str, Any]) -> Iterator[Upload]:
    for number in range(job["clients"]):
        upload = wire.open_upload(folder / f"{number:05d}.safetensors")
        yield dataclasses.replace(upload, client=f"client{number}")


def measure_round(folder: Path, job: Mapping[str, Any], threads: int) -> dict[str, Any]:
    """Seconds of ``FlexLoRA.aggregate``, the peak memory of this process, and the SVD routes."""
    torch.set_num_threads(threads)
    method = FlexLoRA(precision=job["precision"], accuracy=job["accuracy"])
    top = max(job["ranks"])
    zero = {
        name: Factors(torch.zeros(out, 1), torch.zeros(1, in_))
        for name, (out, in_) in job["shapes"].items()
    }
    shapes = {name: tuple(shape) for name, shape in job["shapes"].items()}
    context = RoundContext(1, 0, shapes, dict.fromkeys(shapes, top))
    state = method.start(Adapter(zero), context)
    cohort = Plain().cohort(list(_opened(folder, job)), method.weights, context)
    before = status_kib("VmRSS")
    started = time.perf_counter()
    per_module = method.aggregate(state, cohort, context).per_module
    seconds = time.perf_counter() - started
    how = list(per_module["decomposition"].values())
    routes = [h["route"] for h in how]
    return {
        "seconds": seconds,
        "rss_before_mib": before / 1024,
        "peak_rss_mib": status_kib("VmHWM") / 1024,
        "routes": {route: routes.count(route) for route in sorted(set(routes))},
        "largest_excess": max(h["excess"] for h in how),
        "refused": sum("refused" in h for h in how),
        "largest_lost_energy": max(per_module["lost_energy"].values()),
    }


def round_title(name: str, job: Mapping[str, Any]) -> str:
    """The name in the tables."""
    case = Case(0, 0, job["clients"], tuple(job["ranks"]))
    ranks = "/".join(map(str, case.ranks))
    return f"{name}: {len(job['shapes'])} modules, {case.clients} clients of rank {ranks}"
