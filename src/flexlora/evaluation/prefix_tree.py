"""Prompts as a prefix tree: the first tokens that several prompts share are stored once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Final

import numpy as np

from flexlora.data import Int32s

LEAST_SHARED: Final = 8
"""The tokens that a shared prefix must have: each costs an attention call in every layer."""

_FEW_KEYS: Final = 2048
"""With so few keys in total for a group, it does not matter how many of them are masked."""

Path = list[int]
"""The nodes, by index, from a root of the tree to the end of a prompt."""


@dataclass(frozen=True)
class PrefixNode:
    """The tokens from ``start`` to ``end`` of a prompt, which follow those of ``parent``.

    ``prompt`` is the index of a prompt with these tokens, ``parent`` the index of a node or
    None. ``last`` is true for the node that ends a prompt; each prompt has one of its own.
    """

    parent: int | None
    prompt: int
    start: int
    end: int
    last: bool

    @property
    def tokens(self) -> int:
        """The number of tokens of the node."""
        return self.end - self.start


def tree(prompts: Sequence[Int32s], least_shared: int = LEAST_SHARED) -> list[PrefixNode]:
    """The prompts as nodes, parents first; a prompt is the path from a root to its last node.

    Prompts that begin with the same tokens share a node for them, at any depth, if it has at
    least ``least_shared`` tokens. A prompt keeps at least its last token in a node of its own:
    the model's output there gives the first token of its answer. Costs a sort of the prompts
    and one pass over their tokens.
    """
    order = sorted(range(len(prompts)), key=lambda row: prompts[row].tolist())
    nodes: list[PrefixNode] = []
    # Rows with equal first ``depth`` tokens, of which the first ``start`` are in nodes.
    pending: list[tuple[list[int], int, int, int | None]] = [(order, 0, 0, None)]
    while pending:
        rows, start, depth, parent = pending.pop()
        ends = [row for row in rows if len(prompts[row]) == depth + 1]
        nodes += [PrefixNode(parent, row, start, len(prompts[row]), True) for row in ends]
        longer = (row for row in rows if len(prompts[row]) > depth + 1)
        for _, equal in groupby(longer, key=lambda row: int(prompts[row][depth])):
            branch = list(equal)
            if len(branch) == 1:
                end = len(prompts[branch[0]])
                nodes.append(PrefixNode(parent, branch[0], start, end, True))
                continue
            end = _common(prompts, branch)
            if end - start >= least_shared:
                nodes.append(PrefixNode(parent, branch[0], start, end, False))
                pending.append((branch, end, end, len(nodes) - 1))
            else:
                pending.append((branch, start, end, parent))
    return nodes


def groups(nodes: Sequence[PrefixNode], new: int, room: int) -> list[list[Path]]:
    """The prompts in groups whose sequences are read and continued together.

    A sequence is given by its path. A group needs the tokens of its nodes, each once, and
    ``new`` tokens for each sequence; that is at most ``room``, unless the group is a single
    sequence. Every sequence is given all keys of its group, and those of others are masked;
    so sequences are added only while at least half of the keys are their own, or there are few.
    Prompts with a common prefix are neighbours; at every node the branch with the longest
    prompt comes first, so that the largest memory is needed at the start.
    """
    result: list[list[Path]] = []
    group_nodes: set[int] = set()
    own = 0
    for path in _paths(nodes):
        length = sum(nodes[n].tokens for n in path)
        if result:
            sequences = len(result[-1]) + 1
            tokens = sum(nodes[n].tokens for n in group_nodes.union(path))
            keys = sequences * tokens
            if tokens + sequences * new <= room and keys <= max(2 * (own + length), _FEW_KEYS):
                result[-1].append(path)
                group_nodes.update(path)
                own += length
                continue
        result.append([path])
        group_nodes, own = set(path), length
    return result


def _paths(nodes: Sequence[PrefixNode]) -> list[Path]:
    """The path to the end of each prompt, in the order of ``groups``."""
    longest = [node.end if node.last else 0 for node in nodes]
    for index in reversed(range(len(nodes))):
        parent = nodes[index].parent
        if parent is not None:
            longest[parent] = max(longest[parent], longest[index])
    paths: list[Path] = []
    for index, node in enumerate(nodes):
        paths.append([*([] if node.parent is None else paths[node.parent]), index])
    complete = [path for path, node in zip(paths, nodes, strict=True) if node.last]
    return sorted(complete, key=lambda path: [(-longest[n], nodes[n].prompt) for n in path])


def _common(prompts: Sequence[Int32s], rows: Sequence[int]) -> int:
    """The length of the common prefix of these sorted rows; each keeps a token of its own."""
    first, last = prompts[rows[0]], prompts[rows[-1]]
    most = min(len(prompts[row]) for row in rows) - 1
    unequal = np.flatnonzero(first[:most] != last[:most])
    return int(unequal[0]) if len(unequal) else most
