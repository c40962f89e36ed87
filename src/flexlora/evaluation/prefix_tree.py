"""Prompts as a tree: what several of them begin with stands once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Final

import numpy as np

from flexlora.data import Int32s

WORTH: Final = 8
"""Tokens that a shared beginning must have: each costs an attention call in every layer."""

_LITTLE: Final = 2048
"""Of so many keys for all members together it does not matter how many are masked."""


@dataclass(frozen=True)
class Node:
    """Tokens ``start`` to ``end`` of a prompt, read after those of the ``parent`` node.

    ``prompt`` is any prompt that has these tokens; ``last`` if they end it, which one
    prompt's own node does and no other.
    """

    parent: int | None
    prompt: int
    start: int
    end: int
    last: bool

    @property
    def tokens(self) -> int:
        """How many tokens the node has."""
        return self.end - self.start


def tree(prompts: Sequence[Int32s], worth: int = WORTH) -> list[Node]:
    """The prompts as nodes, parents first; every prompt is the way from a root to its node.

    Prompts that begin with the same tokens share a node for them, at any depth, if it has
    ``worth`` tokens. A prompt keeps at least its last token for itself: the model's output
    there is what its answer begins with. Costs a sort of the prompts and one look at each
    of their tokens.
    """
    order = sorted(range(len(prompts)), key=lambda row: prompts[row].tolist())
    nodes: list[Node] = []
    # Rows that are equal in their first ``depth`` tokens and of which ``start`` are in nodes.
    todo: list[tuple[list[int], int, int, int | None]] = [(order, 0, 0, None)]
    while todo:
        rows, start, depth, parent = todo.pop()
        ends = [row for row in rows if len(prompts[row]) == depth + 1]
        nodes += [Node(parent, row, start, len(prompts[row]), True) for row in ends]
        longer = (row for row in rows if len(prompts[row]) > depth + 1)
        for _, equal in groupby(longer, key=lambda row: int(prompts[row][depth])):
            part = list(equal)
            if len(part) == 1:
                nodes.append(Node(parent, part[0], start, len(prompts[part[0]]), True))
                continue
            end = _common(prompts, part)
            if end - start >= worth:
                nodes.append(Node(parent, part[0], start, end, False))
                todo.append((part, end, end, len(nodes) - 1))
            else:
                todo.append((part, start, end, parent))
    return nodes


def families(nodes: Sequence[Node], new: int, room: int) -> list[list[list[int]]]:
    """The prompts in families whose members are read and continued side by side.

    A member is the way to its prompt: the nodes from a root down. A family takes the tokens
    of its nodes, each once, and ``new`` for each member, and no more than ``room`` unless
    it is one prompt. Every member is shown all that its family keeps, and what is not its
    own is masked; so members join only while at least half of that is their own, or it is
    little. Prompts of a common beginning stand together; at every node the branch with the
    longest prompt comes first, so that the most memory is asked for at the start.
    """
    found: list[list[list[int]]] = []
    held: set[int] = set()
    own = 0
    for way in _ways(nodes):
        length = sum(nodes[n].tokens for n in way)
        if found:
            members = len(found[-1]) + 1
            tokens = sum(nodes[n].tokens for n in held.union(way))
            shown = members * tokens
            if tokens + members * new <= room and shown <= max(2 * (own + length), _LITTLE):
                found[-1].append(way)
                held.update(way)
                own += length
                continue
        found.append([way])
        held, own = set(way), length
    return found


def _ways(nodes: Sequence[Node]) -> list[list[int]]:
    """The way to each prompt, in the order of ``families``."""
    longest = [node.end if node.last else 0 for node in nodes]
    for index in reversed(range(len(nodes))):
        parent = nodes[index].parent
        if parent is not None:
            longest[parent] = max(longest[parent], longest[index])
    ways: list[list[int]] = []
    for index, node in enumerate(nodes):
        ways.append([*([] if node.parent is None else ways[node.parent]), index])
    ends = [way for way, node in zip(ways, nodes, strict=True) if node.last]
    return sorted(ends, key=lambda way: [(-longest[n], nodes[n].prompt) for n in way])


def _common(prompts: Sequence[Int32s], rows: Sequence[int]) -> int:
    """How many tokens all of these sorted rows begin with; each keeps one of its own."""
    first, last = prompts[rows[0]], prompts[rows[-1]]
    most = min(len(prompts[row]) for row in rows) - 1
    unequal = np.flatnonzero(first[:most] != last[:most])
    return int(unequal[0]) if len(unequal) else most
