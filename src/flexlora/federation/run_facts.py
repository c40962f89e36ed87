"""What the journal says of a run beside its rounds: its start, and spectra of its adapters."""

from __future__ import annotations

import itertools
import os
import platform
from importlib import metadata
from typing import Any

import torch

from flexlora.federation.prepared import PreparedRun
from flexlora.journal import counted
from flexlora.lowrank import Adapter, LowRankSum
from flexlora.method import State

SPECTRA = 6
"""Of how many modules the journal has all singular values; of the others, shares of blocks."""


def start_facts(prepared: PreparedRun, resume: bool, rounds_done: int = 0) -> dict[str, Any]:
    """The config, the clients and the machine, for the ``start`` event."""
    types, shapes = prepared.clients.kinds, prepared.shapes
    return {
        "version": metadata.version("flexlora"),
        "config": prepared.experiment.model_dump(mode="json"),
        "hardware": f"{platform.machine()}, {os.cpu_count()} cores, {prepared.base.device}, "
        f"{counted(torch.get_num_threads(), 'thread')}",
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", "numpy")}
        | {"python": platform.python_version()},
        "clients": len(prepared.clients),
        "unseen_clients": len(prepared.unseen),
        "modules": len(shapes),
        "rank_types": dict(prepared.clients.counts),
        "ranks": {
            name: sorted({ranks.get(module, 0) for module in shapes})
            for name, ranks in types.items()
        },
        "trainable": {
            name: sum(rank * sum(shapes[m]) for m, rank in ranks.items())
            for name, ranks in types.items()
        },
        "notices": list(prepared.notices),
        "questions": len(prepared.questions),
        "truncated": list(prepared.truncated),
        "resumed": resume,
        "rounds_done": rounds_done,
    }


def spectrum(prepared: PreparedRun, adapter: Adapter, state: State) -> dict[str, Any]:
    """How the global adapter's energy lies in the blocks between the clients' ranks.

    Energy is the sum of squared singular values. The last block is what the aggregate had beyond
    the largest rank, and so lost. Modules without any energy are left out.
    """
    levels = sorted({rank for ranks in prepared.clients.kinds.values() for rank in ranks.values()})
    lost_energy = state.per_module.get("lost_energy", {})
    shown = set(list(adapter)[:: max(len(adapter) // SPECTRA + 1, 1)])
    energy, values = {}, {}
    for module, factors in adapter.items():
        S = LowRankSum.of([(1.0, factors)]).svd(0).S
        if not S.any():
            continue  # no client has trained it yet
        remaining = 1 - lost_energy.get(module, 0.0)
        squares = (S.square() / S.square().sum().clamp_min(1e-300) * remaining).tolist()
        edges = [0, *levels, len(squares)]
        blocks = [sum(squares[a:b]) for a, b in itertools.pairwise(edges)]
        energy[module] = [*blocks[:-1], blocks[-1] + 1 - remaining]
        if module in shown:
            values[module] = [float(f"{value:.5g}") for value in S.tolist()]
    return {"rank_levels": levels, "energy": energy, "values": values}
