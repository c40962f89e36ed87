"""Which client trains at which rank, and whether the method supports that."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from flexlora.config import (
    PAPER_TYPES,
    Assignment,
    Ranks,
    RankType,
    assign,
    distribution,
    rank_table,
    several,
)
from flexlora.errors import ConfigError
from flexlora.federation.population import Clients
from flexlora.method import Feature, Method, for_mixed_modules, require
from flexlora.model import kind
from flexlora.seeds import rng


def clients_of(
    assignment: Assignment, rows: Mapping[str, Sequence[int]], modules: Sequence[str]
) -> Clients:
    """The clients with these training rows, at their ranks of these modules.

    Raises:
        ConfigError: a rank type that a client has trains none of the modules.
    """
    return Clients(rows, assignment.of, _by_type(assignment, modules))


def assigned(
    settings: Ranks, clients: list[str], seed: int, held_out: Collection[str] = ()
) -> Assignment:
    """Every training client's rank type, from one of the ways to say it."""
    if settings.table is not None:
        settings = rank_table(Path(settings.table), settings.clients)
    if settings.rank is not None:
        name = f"rank{settings.rank}"
        uniform = {name: RankType(settings.rank, settings.rank)}
        return assign(clients, uniform, {name: 1.0}, rng(seed, "ranks"))
    types = (
        {name: RankType(t.attention, t.feed_forward) for name, t in settings.types.items()}
        if settings.types
        else dict(PAPER_TYPES)
    )
    shares = settings.distribution
    if isinstance(shares, str):
        shares = distribution(shares)
    draw = rng(seed, "ranks")
    return assign(clients, types, shares or {}, draw, settings.clients, held_out)


def unused_ranks(assignment: Assignment, modules: Sequence[str]) -> tuple[str, ...]:
    """Sentences about ranks for a kind of layers of which the model has no adapted module."""
    notices = []
    for name in sorted(set(assignment.of.values())):
        type_ = assignment.types[name]
        if type_.attention == type_.feed_forward:
            continue
        for block in ("attention", "feed_forward"):
            if getattr(type_, block) and not any(kind(module) == block for module in modules):
                notices.append(
                    f"The rank {block} = {getattr(type_, block)} of type {name!r} has no effect: "
                    f"none of the {len(modules)} adapted modules is in such a block."
                )
    return tuple(notices)


def suited(method: Method, assignment: Assignment) -> Method:
    """The method for clients of these rank types.

    Raises:
        ConfigError: it cannot be used among them.
    """
    used = {assignment.types[name] for name in assignment.of.values()}
    if several(used):
        histogram = ", ".join(f"{count} {name}" for name, count in assignment.histogram.items())
        require(
            method,
            Feature.MIXED_RANKS,
            f"it needs one rank for all clients, but the clients have {histogram}; set "
            'ranks.rank to it, ranks.types to {} and ranks.distribution to ""',
        )
    return for_mixed_modules(method) if len({kind.targets for kind in used}) > 1 else method


def largest(modules: Sequence[str], kinds: Collection[Mapping[str, int]]) -> dict[str, int]:
    """The largest rank of each module that a client trains."""
    most = {m: max((ranks.get(m, 0) for ranks in kinds), default=0) for m in modules}
    return {module: rank for module, rank in most.items() if rank}


def _by_type(assignment: Assignment, modules: Sequence[str]) -> dict[str, dict[str, int]]:
    """The rank of every adapted module, by rank type.

    Raises:
        ConfigError: a type that a client has trains nothing.
    """
    by_type = {name: kind.by_module(modules) for name, kind in assignment.types.items()}
    for name in set(assignment.of.values()):
        if not by_type[name]:
            raise ConfigError(
                f"Clients of type {name!r} train nothing: {assignment.types[name]} names no rank "
                f"for any of the adapted modules, {modules[:3]} and so on; look at model.targets."
            )
    return by_type
