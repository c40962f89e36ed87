"""Aggregation of subsets of the modules, bit-identical to aggregating all at once.

Several processes may take a part each, and parts may have uploads of their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from flexlora.lowrank import Adapter, Factors
from flexlora.method.averager import Cohort
from flexlora.method.interface import Method, RoundContext, State
from flexlora.method.merge_log import MergeLog
from flexlora.method.truncation import MAX_THREADS

T = TypeVar("T")

PARTS_PER_PROCESS = 4
"""How many parts a process takes at most: several even out errors in the estimate of their cost."""
MODULES_PER_THREAD = 4
"""How many modules a part has at least for each thread; threads wait for each other at its end."""


@dataclass(frozen=True)
class Part:
    """The state after the aggregation of some modules.

    ``unchanged`` names the adapters of ``state.memory`` that stay as they were ("" the model),
    so that they need not travel.
    """

    modules: Sequence[str]
    state: State
    unchanged: frozenset[str] = frozenset()


def aggregate(
    method: Method, state: State, cohort: Cohort, context: RoundContext, modules: Sequence[str]
) -> Part:
    """The aggregate of these modules, by a method that aggregates by module; no other is read.

    Where no client trains one of them, all stays as it is.
    """
    before, trainers = state.only(modules), cohort.only(modules)
    after = before
    if trainers is not None:
        after = method.aggregate(before, trainers, context.only(modules))
    adapters = {"": (before.model, after.model)} | {
        name: (before.memory.get(name), adapter) for name, adapter in after.memory.items()
    }
    unchanged = frozenset(name for name, (old, new) in adapters.items() if old is new)
    return Part(modules, after, unchanged)


def joined(state: State, parts: Sequence[Part], context: RoundContext) -> State:
    """What one step would have made of ``state``; every module is in one of the parts.

    Adapters that no part has changed are those of ``state``, on the disk if they lie there.

    Raises:
        ValueError: a part has changed what is not by module. A method that does so must not
            name the feature ``PER_MODULE``.
    """
    if any(part.state.per_client != state.per_client for part in parts):
        raise ValueError(
            "A part of the modules, aggregated apart, has changed State.per_client; a method whose "
            "modules depend on each other must not name the feature PER_MODULE."
        )
    names = dict.fromkeys(name for part in parts for name in part.state.memory)
    values = dict.fromkeys(name for part in parts for name in part.state.per_module)
    return State(
        _joined_adapter("", state.model, parts, context),
        {name: _joined_adapter(name, state.memory.get(name), parts, context) for name in names},
        {
            name: _in_order(
                [part.state.per_module.get(name, {}) for part in parts], list(context.ranks)
            )
            for name in values
        },
        state.per_client,
        _joined_log(state.merge_log, parts, context),
    )


def split(context: RoundContext, processes: int, threads: int) -> list[list[str]]:
    """All modules in parts of about one cost, the most costly first; a single part has them all.

    A module's cost is the size of its factors at the largest rank. No part has so few modules
    that its threads would share them in another way than they share all: several threads on one
    module round differently.
    """
    ranks = context.ranks
    most = len(ranks) // (MODULES_PER_THREAD * min(threads, MAX_THREADS))
    count = min(PARTS_PER_PROCESS * processes, most)
    if processes < 2 or count < 2:
        return [list(ranks)]
    costs = {module: sum(context.shapes[module]) * rank for module, rank in ranks.items()}
    parts: list[list[str]] = [[] for _ in range(count)]
    for place, module in enumerate(sorted(ranks, key=lambda module: -costs[module])):
        lap, seat = divmod(place, count)
        parts[seat if lap % 2 == 0 else -1 - seat].append(module)
    return sorted(parts, key=lambda part: -sum(costs[module] for module in part))


def _joined_adapter(
    name: str, before: Adapter | None, parts: Sequence[Part], context: RoundContext
) -> Adapter:
    """The parts' modules of one adapter; the one of before if no part has changed it."""
    if before is not None and all(name in part.unchanged for part in parts):
        return before
    factors: dict[str, Factors] = {}
    for part in parts:
        adapter = part.state.memory.get(name) if name else part.state.model
        if name in part.unchanged and before is not None:
            adapter = before.only(part.modules)
        factors |= adapter or {}
    return Adapter(_in_order([factors], list(context.ranks)))


def _joined_log(before: MergeLog, parts: Sequence[Part], context: RoundContext) -> MergeLog:
    """The log with this round's update, of which every part has its modules."""
    logs = [part.state.merge_log for part in parts]
    merged_until = dict(before.merged_until)
    for log in logs:
        merged_until |= {
            id: last for id, last in log.merged_until.items() if last != before.merged_until.get(id)
        }
    updates = dict(before.updates)
    for round in sorted({round for log in logs for round in log.updates} - updates.keys()):
        modules = [log.updates[round] for log in logs if round in log.updates]
        updates[round] = Adapter(_in_order(modules, list(context.ranks)))
    return replace(before, updates=updates, merged_until=merged_until)


def _in_order(tables: Sequence[Mapping[str, T]], order: Sequence[str]) -> dict[str, T]:
    """Tables by module as one, in this order."""
    whole = {module: value for table in tables for module, value in table.items()}
    return {module: whole[module] for module in order if module in whole}
