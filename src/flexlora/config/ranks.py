"""The rank of each client: rank types, their distributions, and the assignment to clients.

The built-in types and distributions are those of FlexLoRA (arXiv 2402.11505, table 1 and
figure 3). If the paper's README and code differ, both are included. The code's ``normal``
evaluates its bell curve at the type's number instead of its size, which gives the largest type
44 %: that variant is ``normal-code``, the intended one is ``normal``.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from flexlora.errors import ConfigError
from flexlora.model import kind


@dataclass(frozen=True)
class RankType:
    """A client's ranks: one for attention and one for feed-forward layers.

    One of the two may be 0: the client does not train these layers.

    Raises:
        ConfigError: a rank is negative, or both are 0.
    """

    attention: int
    feed_forward: int

    def __post_init__(self) -> None:
        if min(self.attention, self.feed_forward) < 0 or self.attention == self.feed_forward == 0:
            raise ConfigError(
                f"The ranks of a client are attention {self.attention} and feed_forward "
                f"{self.feed_forward}; give at least 1 for one of them, and 0 for layers that it "
                "does not train."
            )

    def __str__(self) -> str:
        return rank_text(self.attention, self.feed_forward)

    @property
    def targets(self) -> tuple[bool, bool]:
        """Whether the client trains attention layers, and whether feed-forward layers."""
        return self.attention > 0, self.feed_forward > 0

    def by_module(self, modules: Sequence[str]) -> dict[str, int]:
        """The rank of every module that the client trains.

        Raises:
            ConfigError: the two ranks differ, and a module belongs to neither block.
        """
        if self.attention == self.feed_forward:
            return dict.fromkeys(modules, self.attention)
        ranks = {module: getattr(self, kind(module)) for module in modules}
        return {module: rank for module, rank in ranks.items() if rank}


def rank_text(attention: int, feed_forward: int) -> str:
    """The ranks of a client in words: "rank 8", or "attention 4, feed_forward 0"."""
    if attention == feed_forward:
        return f"rank {attention}"
    return f"attention {attention}, feed_forward {feed_forward}"


PAPER_TYPES: Mapping[str, RankType] = {
    "type1": RankType(8, 8),
    "type2": RankType(30, 30),
    "type3": RankType(30, 200),
    "type4": RankType(200, 200),
}
"""The paper's types under its names, from the smallest to the largest."""

DISTRIBUTIONS: Mapping[str, tuple[float, ...]] = {
    "uniform": (0.25, 0.25, 0.25, 0.25),
    "heavy-tail-light": (0.85, 0.05, 0.05, 0.05),
    "heavy-tail-light-code": (0.80, 0.05, 0.05, 0.10),
    "heavy-tail-strong": (0.05, 0.05, 0.05, 0.85),
    "heavy-tail-strong-code": (0.05, 0.05, 0.10, 0.80),
    "normal": (0.0575, 0.4425, 0.4425, 0.0575),
    "normal-code": (0.0575, 0.0575, 0.4425, 0.4425),
}
"""Shares of the types, from the smallest to the largest. Names without ``-code`` are the
README's."""


def several(types: Collection[RankType]) -> bool:
    """Whether clients of these types train one module at different ranks."""
    by_block = [{each.attention for each in types}, {each.feed_forward for each in types}]
    return any(len(ranks - {0}) > 1 for ranks in by_block)


@dataclass(frozen=True)
class Assignment:
    """The rank types by name, and the name of each client's type (``of``)."""

    types: Mapping[str, RankType]
    of: Mapping[str, str]

    @property
    def histogram(self) -> dict[str, int]:
        """The number of clients of each type."""
        counts = dict.fromkeys(self.types, 0)
        for name in self.of.values():
            counts[name] += 1
        return counts


def distribution(name: str) -> dict[str, float]:
    """The shares of the paper's types in one of its distributions.

    Raises:
        ConfigError: there is no distribution of this name.
    """
    if name not in DISTRIBUTIONS:
        near = difflib.get_close_matches(name, DISTRIBUTIONS, 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(
            f"There is no rank distribution {name!r}.{hint} Set ranks.distribution to one of "
            f"{', '.join(DISTRIBUTIONS)}."
        )
    return dict(zip(PAPER_TYPES, DISTRIBUTIONS[name], strict=True))


def assign(
    clients: Sequence[str],
    types: Mapping[str, RankType],
    shares: Mapping[str, float],
    draw: np.random.Generator,
    explicit: Mapping[str, str] | None = None,
    held_out: Collection[str] = (),
) -> Assignment:
    """A type for every client, independent of its data.

    ``explicit`` gives the types of some clients (not of those ``held_out``, which never train);
    the others get types in the given shares, as exactly as whole clients allow (largest
    remainders), in random order. Differs: the paper's code draws each client's type
    independently, so that small federations miss types.

    Raises:
        ConfigError: a type or client is unknown, or the shares do not add up to 1.
    """
    explicit = explicit or {}
    for place, names in (("ranks.distribution", shares), ("ranks.clients", explicit.values())):
        for name in names:
            if name not in types:
                raise ConfigError(
                    f"{place} names the type {name!r}, which ranks.types does not have; use one "
                    f"of {', '.join(types)}."
                )
    training = set(clients)
    for client in explicit:
        if client not in training:
            raise ConfigError(_unassignable(client, training, held_out))
    others = [client for client in clients if client not in explicit]
    drawn = _drawn_types(shares, len(others), draw) if others else []
    return Assignment(types, {**dict(explicit), **dict(zip(others, drawn, strict=True))})


def _unassignable(client: str, training: Collection[str], held_out: Collection[str]) -> str:
    """Why a client of ``ranks.clients`` cannot have a rank type."""
    if client in held_out:
        return (
            f"ranks.clients names client {client!r}, which is one of the {len(held_out)} held-out "
            "clients that never train (data.unseen_clients); remove it from ranks.clients, or let "
            "another be held out: set data.unseen_clients to 0, or change seed."
        )
    near = difflib.get_close_matches(client, sorted(training), 1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return (
        f"ranks.clients names client {client!r}, which is not one of the {len(training)} clients "
        f"that have training rows.{hint} Correct the name, or remove it from ranks.clients."
    )


def _drawn_types(shares: Mapping[str, float], count: int, draw: np.random.Generator) -> list[str]:
    """The type names of ``count`` clients: the shares by largest remainders, shuffled."""
    if not shares or min(shares.values()) < 0 or abs(sum(shares.values()) - 1) > 1e-6:
        raise ConfigError(
            f"The shares of rank types must add up to 1 and be at least 0, got {dict(shares)}; "
            "correct ranks.distribution."
        )
    quotas = np.array(list(shares.values())) * count
    counts = np.floor(quotas).astype(int)
    order = np.argsort(-(quotas - counts), kind="stable")
    counts[order[: count - counts.sum()]] += 1
    names = np.repeat(np.array(list(shares), dtype=object), counts)
    return [str(name) for name in draw.permutation(names)]
