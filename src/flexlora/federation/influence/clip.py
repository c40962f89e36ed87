"""Uploads with a share of their change: scaled down where they change more than they may."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from flexlora import wire
from flexlora.federation.influence.bounds import Medians
from flexlora.federation.influence.measure import (
    BESIDE,
    PRODUCT,
    Change,
    Starts,
)
from flexlora.lowrank import Adapter, Factors, Way, between
from flexlora.method import Client, Upload, comparable
from flexlora.storage import write_atomically

HALVINGS = 40
ROUNDING = 1e-6
"""How much below its bound a clipped change stays, so that float32 does not bring it above."""


@dataclass(frozen=True)
class Clipped:
    """An upload of which this share of its change was kept."""

    upload: Upload
    share: float


def clipped(
    upload: Upload,
    client: Client,
    change: Change,
    medians: Medians,
    factor: float,
    starts: Starts,
    path: Path,
) -> Clipped:
    """The upload with as much of its change as every bound leaves it, written to ``path``.

    Its factors are points on the way from those of an untrained upload, so that the rank stays;
    where the client started from nothing that the server knows, ``B`` is scaled.
    """
    _, start = starts.of(client)
    share, beside = 1.0, dict.fromkeys(upload.aux, 1.0)
    kinds = sorted(change.bounding & change.norms.keys() & medians.kinds.keys())
    bounds = {kind: medians.allowed(change, kind, factor * (1 - ROUNDING)) for kind in kinds}
    for kind in kinds:
        if kind != PRODUCT:
            fits = _share_of_parameters(change.norms[kind], *bounds[kind])
            if kind.startswith(BESIDE):
                beside[kind.removeprefix(BESIDE)] = fits
            else:
                share = min(share, fits)
    if PRODUCT in bounds:
        modules = change.norms[PRODUCT]
        factors = {m: upload.adapter[m] for m in modules}
        ways = {m: Way.of(f, comparable(f, start, m)) for m, f in factors.items()}
        share = _share_of_product(ways, *bounds[PRODUCT], share)
    in_products = PRODUCT in change.bounding

    def moved(module: str, f: Factors) -> Factors:
        base = comparable(f, start, module)
        return between(f, base, share, in_products and base is None).to(torch.float32)

    adapter = upload.adapter
    if share < 1:
        adapter = Adapter({m: moved(m, f) for m, f in upload.adapter.items()})
    aux = {
        name: each if beside[name] == 1 else _scaled(each, beside[name])
        for name, each in upload.aux.items()
    }
    path.parent.mkdir(exist_ok=True)
    changed = replace(upload, adapter=adapter, aux=aux)
    write_atomically(path, wire.encode_upload(changed, torch.float32))
    read = wire.open_upload(path)
    kept = min(share, *beside.values()) if beside else share
    return Clipped(replace(changed, adapter=read.adapter, aux=read.aux), kept)


def _share_of_parameters(
    norms: Mapping[str, float], whole: float, single: Mapping[str, float]
) -> float:
    """The largest share of a change of parameters at which every bound holds."""
    total = math.sqrt(math.fsum(norm**2 for norm in norms.values()))
    fits = [single[m] / norm for m, norm in norms.items() if norm]
    return min([1.0, whole / total, *fits]) if total else 1.0


def _share_of_product(
    ways: Mapping[str, Way], whole: float, single: Mapping[str, float], most: float
) -> float:
    """A share of the way, at most ``most``, at which every bound holds; by bisection.

    The norm need not grow on the way, but at its beginning nothing has changed.
    """

    def holds(share: float) -> bool:
        norms = {m: way.norm(share) for m, way in ways.items()}
        total = math.sqrt(math.fsum(norm**2 for norm in norms.values()))
        return total <= whole and all(norm <= single[m] for m, norm in norms.items())

    if holds(most):
        return most
    low, high = 0.0, most
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def _scaled(adapter: Adapter, share: float) -> Adapter:
    return Adapter({m: between(f, None, share).to(torch.float32) for m, f in adapter.items()})
