"""Clients that do not all train the same modules: of each module the mean is over its trainers.

A phone may train the attention alone, a data centre the feed-forward blocks as well. Modules
that a client does not train are neither handed to it nor sent by it; in a round in which nobody
trains a module, it stays as it is.

Differs from a truncation to rank 0, which would count such a client with an update of zero.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from flexlora import model
from flexlora.adapter import Adapter, Factors
from flexlora.aggregation import log, unmerged
from flexlora.method import Client, Download, Draw, Expected, Method, State, Upload
from flexlora.wrapping import Wrapping


@dataclass(frozen=True)
class Targeted(Wrapping):
    """A method among clients whose ``ranks`` name some of the modules only."""

    def handout(self, state: State, client: Client, draw: Draw) -> Download:
        """The method's, of the client's modules; what is merged for good is of all modules."""
        download = self.method.handout(part_of(state, client.ranks), client, draw)
        return replace(download, merge=unmerged(state, client)) if log(state) else download

    def expects(
        self, state: State, client: Client, shapes: Mapping[str, tuple[int, int]]
    ) -> Mapping[str, Expected]:
        """The method's, of the client's modules."""
        theirs = {module: shapes[module] for module in client.ranks}
        return self.method.expects(part_of(state, client.ranks), client, theirs)

    def aggregate(self, state: State, uploads: Sequence[Upload]) -> State:
        """The method's, for attention and for feed-forward modules from those who train them."""
        every = state.adapters["global"].keys()
        held = [*state.adapters.values(), *(upload.adapter for upload in uploads)]
        if all(adapter.keys() >= every for adapter in held):
            return self.method.aggregate(state, uploads)
        parts = []
        for modules in _by_kind(list(state.adapters["global"])):
            part = part_of(state, modules)
            holders = [upload_of(upload, modules) for upload in uploads]
            holders = [upload for upload in holders if len(upload.adapter)]
            parts.append(self.method.aggregate(part, holders) if holders else part)
        return joined(state, parts)


def targeted(method: Method) -> Targeted:
    """The method for clients that train different modules.

    Raises:
        ValueError: it decides over all modules at once.
    """
    if not method.by_module:
        raise ValueError(
            f"{method.title} decides over all modules at once, so that every client must train all "
            "of them; give every rank type an attention and a feed_forward rank of at least 1, or "
            "use a method such as 'flexlora'."
        )
    return Targeted(method)


def _by_kind(modules: Sequence[str]) -> list[list[str]]:
    """The modules of attention and those of feed-forward blocks, as far as there are any."""
    kinds: dict[str, list[str]] = {}
    for module in modules:
        kinds.setdefault(model.kind(module), []).append(module)
    return list(kinds.values())


def part_of(state: State, modules: Collection[str]) -> State:
    """What a state holds of these modules.

    A fact that is said module by module is kept for these alone, and others as they are; an
    adapter that has none of the modules is left out.
    """
    every = set(state.adapters["global"])
    adapters = {name: adapter.only(modules) for name, adapter in state.adapters.items()}
    return State(
        {name: adapter for name, adapter in adapters.items() if len(adapter)},
        {name: _of(fact, every, set(modules)) for name, fact in state.facts.items()},
    )


def upload_of(upload: Upload, modules: Collection[str]) -> Upload:
    """What an upload holds of these modules."""
    terms = {module: terms for module, terms in upload.terms.items() if module in set(modules)}
    return replace(upload, adapter=upload.adapter.only(modules), terms=terms)


def joined(whole: State, parts: Sequence[State]) -> State:
    """``whole`` after its parts, which together are all of it, have become ``parts``.

    Raises:
        ValueError: two parts have changed the same fact, and not alike.
    """
    every = list(whole.adapters["global"])
    names = dict.fromkeys(name for state in (whole, *parts) for name in state.adapters)
    adapters = {}
    for name in names:
        found: dict[str, Factors] = {}
        for part in parts:
            found.update(part.adapters.get(name, {}))
        if found:
            adapters[name] = Adapter({m: found[m] for m in every if m in found})
    facts: dict[str, Any] = dict(whole.facts)
    for name in dict.fromkeys(name for part in parts for name in part.facts):
        said = [part.facts[name] for part in parts if name in part.facts]
        facts[name] = _changed(name, whole.facts.get(name), said)
    return State(adapters, facts)


def _of(fact: Any, every: set[str], modules: set[str]) -> Any:
    """A fact of some modules, if it is one of modules."""
    if not isinstance(fact, Mapping) or not fact or not fact.keys() <= every:
        return fact
    return {module: value for module, value in fact.items() if module in modules}


def _changed(name: str, before: Any, after: Sequence[Any]) -> Any:
    """A fact after all changes that parts have made to it, key by key where it is a mapping."""
    if after and all(isinstance(value, Mapping) for value in after):
        known = before if isinstance(before, Mapping) else {}
        keys = dict.fromkeys(key for table in (known, *after) for key in table)
        return {
            key: _changed(name, known.get(key), [table[key] for table in after if key in table])
            for key in keys
        }
    changed = [value for value in after if value != before]
    if any(value != changed[0] for value in changed):
        raise ValueError(
            f"Parts of the modules, aggregated apart, left the fact {name!r} as {changed[0]!r} and "
            f"as {changed[-1]!r}; a method whose parts depend on each other must not declare "
            "by_module."
        )
    return changed[0] if changed else before
