"""A server step in parts: each of some modules, to the bits of one of all.

Several processes may take a part each, and parts may have uploads of their own.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from flexlora.lowrank import Adapter, Factors
from flexlora.method.averaging import MOST_WORKERS
from flexlora.method.interface import Method, State, Upload

PARTS_A_PROCESS = 4
"""How many parts a process takes at most: several even out what is only guessed of their cost."""
MODULES_A_THREAD = 4
"""How many modules a part has at least for each thread; threads wait for each other at its end."""


@dataclass(frozen=True)
class Part:
    """What comes of some modules; an adapter that stays as it was is None."""

    modules: Sequence[str]
    adapters: Mapping[str, Adapter | None]
    facts: Mapping[str, Any]


def part_of(state: State, modules: Collection[str]) -> State:
    """What a state holds of these modules.

    A fact that is said module by module is kept for these alone, and others as they are; an
    adapter that has none of the modules is left out.
    """
    every, wanted = set(state.adapters["global"]), set(modules)
    adapters = {name: adapter.only(wanted) for name, adapter in state.adapters.items()}
    facts = {
        name: {m: fact[m] for m in fact if m in wanted} if _of_modules(fact, every) else fact
        for name, fact in state.facts.items()
    }
    return State({name: adapter for name, adapter in adapters.items() if len(adapter)}, facts)


def upload_of(upload: Upload, modules: Collection[str]) -> Upload:
    """What an upload holds of these modules."""
    terms = {module: terms for module, terms in upload.terms.items() if module in set(modules)}
    return replace(upload, adapter=upload.adapter.only(modules), terms=terms)


def aggregated(
    method: Method, state: State, uploads: Sequence[Upload], modules: Sequence[str]
) -> Part:
    """The aggregate of these modules, by a method that goes ``by_module``; no other is read.

    Without uploads all stays as it is.
    """
    given = part_of(state, modules)
    found = method.aggregate(given, [upload_of(u, modules) for u in uploads]) if uploads else given
    adapters = {
        name: None if adapter is given.adapters.get(name) else adapter
        for name, adapter in found.adapters.items()
    }
    return Part(modules, adapters, found.facts)


def joined(state: State, parts: Sequence[Part]) -> State:
    """What one step would have made of ``state``; every module is in one of the parts.

    Adapters that no part has changed are those of ``state``, on the disk if they lie there.

    Raises:
        ValueError: two parts have changed the same fact, and not alike.
    """
    adapters, order = {}, _order(state, parts)
    for name in dict.fromkeys(name for part in parts for name in part.adapters):
        if all(part.adapters.get(name) is None for part in parts):
            adapters[name] = state.adapters[name]
            continue
        made = {m: f for part in parts for m, f in _now(part, name, state).items()}
        adapters[name] = Adapter({module: made[module] for module in order if module in made})
    facts = {}
    for name in dict.fromkeys(name for part in parts for name in part.facts):
        said = [part.facts[name] for part in parts if name in part.facts]
        facts[name] = _said(name, state, said)
    return State(adapters, facts)


def dealt(state: State, processes: int, threads: int) -> list[list[str]]:
    """All modules in parts of about one cost, the most costly first; a single one has them all.

    A module costs what its factors of the largest rank weigh. No part has so few modules that its
    threads would share them otherwise than they share all, as more threads on one module round
    otherwise.
    """
    known, ranks = state.adapters["global"], state.facts.get("ranks", {})
    most = len(known) // (MODULES_A_THREAD * min(threads, MOST_WORKERS))
    count = min(PARTS_A_PROCESS * processes, most)
    if processes < 2 or count < 2:
        return [list(known)]
    costs = {module: sum(f.shape) * ranks.get(module, f.rank) for module, f in known.items()}
    found: list[list[str]] = [[] for _ in range(count)]
    for place, module in enumerate(sorted(known, key=lambda module: -costs[module])):
        lap, seat = divmod(place, count)
        found[seat if lap % 2 == 0 else -1 - seat].append(module)
    return sorted(found, key=lambda part: -sum(costs[module] for module in part))


def _now(part: Part, name: str, state: State) -> Mapping[str, Factors]:
    """A part's modules of one adapter, those of ``state`` where it left them as they were."""
    if name not in part.adapters:
        return {}
    made = part.adapters[name]
    return state.adapters[name].only(part.modules) if made is None else made


def _said(name: str, state: State, said: Sequence[Any]) -> Any:
    """A fact after the changes of all parts; of modules each part has its own."""
    if all(fact == said[0] for fact in said):
        return said[0]
    every = set(state.adapters["global"])
    if all(_of_modules(fact, every) for fact in said if fact):
        return {module: value for fact in said for module, value in fact.items()}
    before = state.facts.get(name)
    if not all(isinstance(fact, Mapping) for fact in said):
        return _changed(name, before, said)
    known = before if isinstance(before, Mapping) else {}
    keys = dict.fromkeys(key for table in (known, *said) for key in table)
    return {k: _changed(name, known.get(k), [t[k] for t in said if k in t]) for k in keys}


def _changed(name: str, before: Any, after: Sequence[Any]) -> Any:
    """What has become of a value that every part may have changed."""
    changed = [value for value in after if value != before]
    if any(value != changed[0] for value in changed):
        raise ValueError(
            f"Parts of the modules, aggregated apart, left the fact {name!r} as {changed[0]!r} and "
            f"as {changed[-1]!r}; a method whose parts depend on each other must not declare "
            "by_module."
        )
    return changed[0] if changed else before


def _of_modules(fact: Any, every: set[str]) -> bool:
    """Whether a fact is said module by module."""
    return isinstance(fact, Mapping) and bool(fact) and fact.keys() <= every


def _order(state: State, parts: Sequence[Part]) -> list[str]:
    """The order in which one process would have gone through the modules.

    Methods go by the last adapter or by the ranks, as the order within the parts tells, and what
    the journal adds up over modules goes by the outcome.
    """
    ways = [list(state.adapters["global"]), list(state.facts.get("ranks", {}))]
    made = [a for part in parts for a in part.adapters.values() if a is not None]
    for way in ways:
        place = {module: number for number, module in enumerate(way)}
        if all(m in place for a in made for m in a) and all(
            list(adapter) == sorted(adapter, key=place.__getitem__) for adapter in made
        ):
            return way
    return ways[0]
