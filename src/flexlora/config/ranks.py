"""Which rank each client trains at: the paper's types and distributions, and your own.

Types and distributions are those of FlexLoRA (arXiv 2402.11505, table 1 and figure 3). Where
the paper's README and code differ, both are here; the code's ``normal`` evaluates its bell at
the type's number instead of at its size and gives the largest type 44 %: that variant is
``normal-code``, the intended one ``normal``.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flexlora.errors import ConfigError
from flexlora.model import kind


@dataclass(frozen=True)
class RankType:
    """A kind of client by its means: a rank for attention and one for feed-forward layers.

    One of the two may be 0: layers that the client does not train.
    """

    attention: int
    feed_forward: int

    def __post_init__(self) -> None:
        if min(self.attention, self.feed_forward) < 0 or self.attention == self.feed_forward == 0:
            raise ConfigError(
                f"A client trains at a rank of at least 1, or 0 for one of the two kinds of "
                f"layers, got {self}."
            )

    @property
    def targets(self) -> tuple[bool, bool]:
        """Whether it trains attention, and feed-forward layers."""
        return self.attention > 0, self.feed_forward > 0

    def by_module(self, modules: Sequence[str]) -> dict[str, int]:
        """The rank of every module that it trains."""
        if self.attention == self.feed_forward:
            return dict.fromkeys(modules, self.attention)
        ranks = {module: getattr(self, kind(module)) for module in modules}
        return {module: rank for module, rank in ranks.items() if rank}


PAPER_TYPES: Mapping[str, RankType] = {
    "type1": RankType(8, 8),
    "type2": RankType(30, 30),
    "type3": RankType(30, 200),
    "type4": RankType(200, 200),
}
"""From the smallest to the largest, as the paper numbers them."""

DISTRIBUTIONS: Mapping[str, tuple[float, ...]] = {
    "uniform": (0.25, 0.25, 0.25, 0.25),
    "heavy-tail-light": (0.85, 0.05, 0.05, 0.05),
    "heavy-tail-light-code": (0.80, 0.05, 0.05, 0.10),
    "heavy-tail-strong": (0.05, 0.05, 0.05, 0.85),
    "heavy-tail-strong-code": (0.05, 0.05, 0.10, 0.80),
    "normal": (0.0575, 0.4425, 0.4425, 0.0575),
    "normal-code": (0.0575, 0.0575, 0.4425, 0.4425),
}
"""Shares of the types, from the smallest to the largest. Plain names are the README's."""


def several(types: Collection[RankType]) -> bool:
    """Whether a module is trained at several ranks by clients of these types."""
    levels = [{kind.attention for kind in types}, {kind.feed_forward for kind in types}]
    return any(len(ranks - {0}) > 1 for ranks in levels)


@dataclass(frozen=True)
class Assignment:
    """The type of every client."""

    types: Mapping[str, RankType]
    of: Mapping[str, str]

    @property
    def histogram(self) -> dict[str, int]:
        """How many clients are of each type."""
        counts = dict.fromkeys(self.types, 0)
        for name in self.of.values():
            counts[name] += 1
        return counts


def distribution(name: str) -> dict[str, float]:
    """The shares of the paper's types under one of its distributions.

    Raises:
        ConfigError: there is none of this name.
    """
    if name not in DISTRIBUTIONS:
        near = difflib.get_close_matches(name, DISTRIBUTIONS, 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(
            f"There is no rank distribution {name!r}.{hint} There are: {', '.join(DISTRIBUTIONS)}."
        )
    return dict(zip(PAPER_TYPES, DISTRIBUTIONS[name], strict=True))


def assign(
    clients: Sequence[str],
    types: Mapping[str, RankType],
    shares: Mapping[str, float],
    draw: np.random.Generator,
    explicit: Mapping[str, str] | None = None,
) -> Assignment:
    """A type for every client, once and independently of its data.

    ``explicit`` names some clients' types; the others are dealt out in the shares given, as
    exactly as whole clients allow (largest remainders), in random order. Differs: the
    paper's code draws each client's type for itself, so that small federations miss types.

    Raises:
        ConfigError: a type or client is unknown, or the shares are no distribution.
    """
    explicit = explicit or {}
    for place, names in (("ranks.distribution", shares), ("ranks.clients", explicit.values())):
        for name in names:
            if name not in types:
                raise ConfigError(f"{place} names the type {name!r}; the types are {list(types)}.")
    known = set(clients)
    for client in explicit:
        if client not in known:
            raise ConfigError(
                f"ranks.clients names client {client!r}, which the data does not have."
            )
    rest = [client for client in clients if client not in explicit]
    dealt = _dealt(shares, len(rest), draw) if rest else []
    return Assignment(types, {**dict(explicit), **dict(zip(rest, dealt, strict=True))})


def _dealt(shares: Mapping[str, float], count: int, draw: np.random.Generator) -> list[str]:
    if not shares or min(shares.values()) < 0 or abs(sum(shares.values()) - 1) > 1e-6:
        raise ConfigError(f"The shares of rank types must add up to 1, got {dict(shares)}.")
    quotas = np.array(list(shares.values())) * count
    counts = np.floor(quotas).astype(int)
    order = np.argsort(-(quotas - counts), kind="stable")
    counts[order[: count - counts.sum()]] += 1
    names = np.repeat(np.array(list(shares), dtype=object), counts)
    return [str(name) for name in draw.permutation(names)]


def read_table(path: Path) -> dict[str, Any]:
    """The ``[ranks]`` table of a TOML file, or the whole file if it has none.

    Raises:
        ConfigError: the file is missing or is no TOML.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"The rank table {path} cannot be read: {error}") from error
    table = content.get("ranks", content)
    return dict(table)
