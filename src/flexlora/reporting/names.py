"""Names from a journal: their order, and how they are shortened."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

_OF_A_CLIENT = re.compile(r"r([0-9]+)(?:-([0-9]+))?")
"""The rank type of a real client in journals of earlier versions: its rank, or two."""

_SPELLED = re.compile(r"rank [0-9]+|attention [0-9]+, feed_forward [0-9]+")
"""The rank type of a real client: its ranks in words."""


def natural(name: str) -> list[Any]:
    """A key that sorts client-10 after client-9.

    Digits are compared by their number and then as text: very long integers are refused by Python.
    """
    parts = re.split("([0-9]+)", name)
    parts[1::2] = [digits.lstrip("0") for digits in parts[1::2]]
    return [(len(part), part) if i % 2 else part for i, part in enumerate(parts)]


def shortened(text: str, longest: int = 60) -> str:
    """A text on one line, cut at its end; dots show that something is left out.

    Characters that are not visible, such as those that reverse the direction of a text, are
    replaced by a visible one.
    """
    line = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text.strip())
    return line if len(line) <= longest else f"{line[: longest - 1]}…"


def rank_text(rank_type: str, ranks: Sequence[int], config: Mapping[str, Any]) -> str:
    """The ranks of a type in words, such as rank 8, or attention 4, feed_forward 0.

    ``ranks`` are the different ranks of its modules, as a journal has them; ``config`` is the
    run's. Empty if nothing is known.
    """
    types = (config.get("ranks") or {}).get("types") or {}
    by_kind = types.get(rank_type) if isinstance(types, Mapping) else None
    if isinstance(by_kind, Mapping) and by_kind.keys() == {"attention", "feed_forward"}:
        return _both(by_kind["attention"], by_kind["feed_forward"])
    if _SPELLED.fullmatch(rank_type):
        return rank_type
    if own := _OF_A_CLIENT.fullmatch(rank_type):
        return _both(own[1], own[2] or own[1])
    if not ranks:
        return ""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    return f"ranks {', '.join(map(str, ranks))}"


def rank_type_text(rank_type: str, ranks: Sequence[int], config: Mapping[str, Any]) -> str:
    """A rank type with its ranks; of a real client, whose type is made of them, the ranks alone."""
    spelled = rank_text(rank_type, ranks, config)
    if not rank_type or _OF_A_CLIENT.fullmatch(rank_type) or spelled == rank_type:
        return spelled
    name = shortened(rank_type)
    return f"{name}: {spelled}" if spelled else name


def _both(attention: Any, feed_forward: Any) -> str:
    if attention == feed_forward:
        return f"rank {attention}"
    return f"attention {attention}, feed_forward {feed_forward}"
