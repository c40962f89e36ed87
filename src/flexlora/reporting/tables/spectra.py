"""Singular values of the global update as rows.

The energy of an update is the sum of its squared singular values.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from flexlora.journal import Event
from flexlora.reporting.tables.selection import last_of, of_type


@dataclass(frozen=True)
class SpectrumRow:
    """The singular values of one module's global update after one round, descending."""

    round: int
    module: str
    values: tuple[float, ...]


@dataclass(frozen=True)
class EnergyRow:
    """The share of the energy in one block of ranks, in percent: the mean over modules."""

    round: int
    block: str
    share: float


@dataclass(frozen=True)
class KeptRow:
    """The energy in percent that truncation to a rank keeps: statistics over modules."""

    round: int
    rank: int
    mean: float
    lowest: float
    highest: float


def spectrum_table(events: Iterable[Event]) -> list[SpectrumRow]:
    """The recorded singular values, by module and then by round."""
    rows = {
        (module, event["round"]): SpectrumRow(event["round"], module, tuple(values))
        for event in of_type(events, "spectrum")
        for module, values in (event.get("values") or {}).items()
    }
    modules = {module: place for place, (module, _) in reversed(list(enumerate(rows)))}
    return sorted(rows.values(), key=lambda row: (modules[row.module], row.round))


def energy_table(events: Iterable[Event]) -> list[EnergyRow]:
    """The share of the energy in each block between rank levels, averaged over modules."""
    rows = []
    for number, event in _energies(events).items():
        shares = list(event["energy"].values())
        for place, block in enumerate(_blocks(event["rank_levels"])):
            mean = sum(module[place] for module in shares) / len(shares)
            rows.append(EnergyRow(number, block, 100 * mean))
    return rows


def kept_table(events: Iterable[Event]) -> list[KeptRow]:
    """The energy that truncation to each rank level keeps, at the last recorded spectrum."""
    energies = _energies(events)
    if not energies:
        return []
    number, event = list(energies.items())[-1]
    rows = []
    for place, rank in enumerate(event["rank_levels"]):
        shares = [100 * sum(module[: place + 1]) for module in event["energy"].values()]
        rows.append(KeptRow(number, rank, sum(shares) / len(shares), min(shares), max(shares)))
    return rows


def _energies(events: Iterable[Event]) -> dict[int, Event]:
    spectra = last_of(events, "spectrum", "round")
    complete = [e for e in spectra if e.get("energy") and e.get("rank_levels")]
    return {event["round"]: event for event in sorted(complete, key=lambda e: e["round"])}


def _blocks(levels: Sequence[int]) -> list[str]:
    starts = [1, *(level + 1 for level in levels)]
    inner = [f"{a}–{b}" if a < b else f"{b}" for a, b in zip(starts, levels, strict=False)]
    return [*inner, f"{starts[-1]} and beyond"]
