"""Sequence packing: several examples in one row of tokens, with shared prefixes stored once.

A row is a forest. A segment of tokens either begins an example or continues another segment,
its prefix: the first tokens of several examples, which are in the row once. Examples of one
client often share a long instruction, so that a row has two to three times fewer tokens than
its examples; what is computed for a shared token is the same for all of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from flexlora.data.encoding import Int32s
from flexlora.data.tokens import Int64s, TokenStore
from flexlora.errors import DataError

_WORTH_TOKENS: Final = 8
"""The tokens that a shared prefix must save: about the cost of its extra attention calls."""

_BLOCK_TOKENS: Final = 512
"""The approximate number of tokens in one masked attention call."""


@dataclass(frozen=True)
class Forest:
    """The segments of a row: their bounds, and the segment that each continues (or -1).

    Segment i has the tokens from ``edges[i]`` to ``edges[i + 1]`` and continues segment
    ``prefixes[i]``. A prefix continues no other segment, and the segments that continue it
    follow directly after it.

    Raises:
        DataError: a segment is empty or continues a segment that it cannot.
    """

    edges: tuple[int, ...]
    prefixes: tuple[int, ...]

    def __post_init__(self) -> None:
        bounds = itertools.pairwise(self.edges)
        sized = self.edges[:1] == (0,) and len(self.edges) == len(self.prefixes) + 1
        if not sized or any(b <= a for a, b in bounds):
            raise DataError(
                f"Edges {self.edges} do not bound {len(self.prefixes)} segments; give one more "
                "edge than segments, ascending from 0."
            )
        for index, prefix in enumerate(self.prefixes):
            if prefix != -1 and (index == 0 or prefix != self.root(index - 1)):
                raise DataError(
                    f"Segment {index} cannot continue segment {prefix}; a segment continues the "
                    "root of the tree directly before it."
                )

    def root(self, segment: int) -> int:
        """The first segment of the tree to which this segment belongs."""
        return segment if self.prefixes[segment] < 0 else self.prefixes[segment]

    @cached_property
    def trees(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        """The segments (first, end) of each tree; a shared prefix is the first of its tree."""
        trees: list[list[tuple[int, int]]] = []
        for span, prefix in zip(itertools.pairwise(self.edges), self.prefixes, strict=True):
            if prefix < 0:
                trees.append([])
            trees[-1].append(span)
        return tuple(tuple(tree) for tree in trees)

    @property
    def longest(self) -> int:
        """The number of tokens of the longest example, including its prefix."""
        own = [max((b - a for a, b in tree[1:]), default=0) for tree in self.trees]
        return max(t[0][1] - t[0][0] + n for t, n in zip(self.trees, own, strict=True))

    @cached_property
    def positions(self) -> Tensor:
        """The position (tokens,) of each token in its example, from 0."""
        runs = []
        for tree in self.trees:
            root, *own = tree
            runs.append(torch.arange(root[1] - root[0]))
            runs += [torch.arange(b - a) + (root[1] - root[0]) for a, b in own]
        return torch.cat(runs)

    def mask(self, first: int, end: int) -> Tensor:
        """The attention mask (n, n) of the tokens from ``first`` to ``end``, in bool.

        Rows are queries, columns are keys; true where a query attends to a key.
        """
        allowed = torch.zeros(end - first, end - first, dtype=torch.bool)
        for tree in self.trees:
            if not first <= tree[0][0] < end:
                continue
            root = slice(tree[0][0] - first, tree[0][1] - first)
            for a, b in tree:
                own = slice(a - first, b - first)
                allowed[own, root] = True
                allowed[own, own] = torch.ones(b - a, b - a, dtype=torch.bool).tril()
        return allowed

    @cached_property
    def blocks(self) -> tuple[tuple[int, int, Tensor], ...]:
        """Runs (first, end, mask) of whole trees of about ``_BLOCK_TOKENS`` tokens each."""
        bounds = [0]
        for tree in self.trees:
            if tree[-1][1] - bounds[-1] > _BLOCK_TOKENS and tree[0][0] > bounds[-1]:
                bounds.append(tree[0][0])
        pairs = itertools.pairwise([*bounds, self.edges[-1]])
        return tuple((first, end, self.mask(first, end)) for first, end in pairs)


@dataclass(frozen=True, eq=False)
class Pack:
    """Several examples in one row of T tokens, as input of a model.

    ``input_ids`` and ``position_ids`` are (1, T); an example's positions begin at 0 and
    continue those of its prefix. The n positions of the loss are ``loss_positions`` (n,), the
    next tokens there are ``labels`` (n,), and the examples that they belong to are ``owners``
    (n,), indices into the packed examples. A position in a shared prefix may occur once for
    each of its examples. All are int64 on the CPU.
    """

    input_ids: Tensor
    position_ids: Tensor
    forest: Forest
    loss_positions: Tensor
    labels: Tensor
    owners: Tensor

    @property
    def tokens(self) -> int:
        """The number of tokens in the row; shared tokens count once, and there is no padding."""
        return self.input_ids.shape[1]


@dataclass(frozen=True)
class _Tree:
    """Examples (by index) that share their first ``prefix`` tokens.

    ``cost`` is the number of their tokens, shared tokens once, plus ``_WORTH_TOKENS`` for a
    prefix.
    """

    examples: tuple[int, ...]
    prefix: int
    cost: int


def steps(
    indices: Sequence[int] | Int64s, examples_per_step: int, rng: np.random.Generator
) -> list[list[int]]:
    """One shuffled epoch over ``indices``: the rows of each optimiser step.

    The last step may have fewer rows.

    Raises:
        DataError: ``examples_per_step`` is below 1.
    """
    if examples_per_step < 1:
        raise DataError(
            f"A step cannot have {examples_per_step} examples; set training.batch_examples to at "
            "least 1."
        )
    shuffled = rng.permutation(np.asarray(indices, np.int64)).tolist()
    starts = range(0, len(shuffled), examples_per_step)
    return [shuffled[start : start + examples_per_step] for start in starts]


def packs(
    store: TokenStore, rows: Sequence[int], tokens_per_pack: int, share: bool = True
) -> list[list[int]]:
    """The rows divided into packs of at most ``tokens_per_pack`` tokens.

    A single longer row is a pack of its own. Rows that share a prefix stay together as far as
    they fit; the largest groups are placed first, each in the first pack with enough room
    (first-fit decreasing).

    Raises:
        DataError: ``tokens_per_pack`` is below 1.
    """
    if tokens_per_pack < 1:
        raise DataError(
            f"A pack cannot have {tokens_per_pack} tokens; set training.pack_tokens to at least 1."
        )
    ids = [store[row].ids for row in rows]
    pieces = [p for tree in _trees(ids, share) for p in _split(tree, ids, tokens_per_pack)]
    # By cost, not by tokens: ``pack`` builds trees for any rows that cost no more than these.
    bins = first_fit([piece.cost for piece in pieces], tokens_per_pack)
    return [[rows[i] for piece in members for i in pieces[piece].examples] for members in bins]


def pack(
    store: TokenStore, rows: Sequence[int], prompt_loss: bool = False, share: bool = True
) -> Pack:
    """These rows of the store in one row of tokens.

    The loss is over the response tokens; with ``prompt_loss`` over every token except the first
    of each example, which has no predecessor. Without ``share`` no two examples share a token.
    Costs O(n^2) comparisons for n rows that share tokens.

    Raises:
        DataError: ``rows`` is empty.
    """
    if not len(rows):
        raise DataError("A pack needs at least one row, but none was given.")
    examples = [store[int(row)] for row in rows]
    ids = [tokens.ids for tokens in examples]
    segments: list[tuple[Int32s, int]] = []
    edges: list[int] = [0]
    prefixes: list[int] = []
    losses = []
    for tree in _trees(ids, share):
        root, shared = len(prefixes), tree.prefix
        if shared:
            segments.append((ids[tree.examples[0]][:shared], 0))
            edges.append(edges[-1] + shared)
            prefixes.append(-1)
        for i in tree.examples:
            example, begin = examples[i], edges[-1]
            segments.append((example.ids[shared:], shared))
            edges.append(begin + len(example) - shared)
            prefixes.append(root if shared else -1)
            at = np.arange(0 if prompt_loss else example.prompt_tokens - 1, len(example) - 1)
            in_row = np.where(at < shared, edges[root] + at, begin + at - shared)
            losses.append(np.stack([in_row, example.ids[at + 1], np.full_like(at, i)]))
    input_ids = np.concatenate([segment for segment, _ in segments]).astype(np.int64)
    positions = np.concatenate([np.arange(len(ids)) + first for ids, first in segments])
    loss_positions, labels, owners = torch.from_numpy(np.concatenate(losses, axis=1))
    return Pack(
        input_ids=torch.from_numpy(input_ids)[None],
        position_ids=torch.from_numpy(positions)[None],
        forest=Forest(tuple(edges), tuple(prefixes)),
        loss_positions=loss_positions,
        labels=labels,
        owners=owners,
    )


def join(rows: Sequence[Pack]) -> Pack:
    """Several packs, one after the other, as one pack; owners are the packs' indices."""
    starts = np.cumsum([0, *(row.tokens for row in rows)]).tolist()
    edges: list[int] = [0]
    prefixes: list[int] = []
    for row in rows:
        segments, start = len(prefixes), edges[-1]
        prefixes += [p if p < 0 else p + segments for p in row.forest.prefixes]
        edges += [start + edge for edge in row.forest.edges[1:]]
    return Pack(
        input_ids=torch.cat([row.input_ids for row in rows], dim=1),
        position_ids=torch.cat([row.position_ids for row in rows], dim=1),
        forest=Forest(tuple(edges), tuple(prefixes)),
        loss_positions=torch.cat(
            [row.loss_positions + start for row, start in zip(rows, starts[:-1], strict=True)]
        ),
        labels=torch.cat([row.labels for row in rows]),
        owners=torch.cat([torch.full_like(row.owners, i) for i, row in enumerate(rows)]),
    )


def first_fit(sizes: Sequence[int], room: int) -> list[list[int]]:
    """The indices of ``sizes`` in bins of ``room``, by first-fit decreasing.

    An item larger than ``room`` gets a bin of its own.
    """
    bins: list[list[int]] = []
    totals: list[int] = []
    for item in np.argsort(-np.asarray(sizes, np.int64), kind="stable").tolist():
        for number, total in enumerate(totals):
            if total + sizes[item] <= room:
                bins[number].append(item)
                totals[number] += sizes[item]
                break
        else:
            bins.append([item])
            totals.append(sizes[item])
    return bins


def _trees(ids: Sequence[Int32s], share: bool) -> list[_Tree]:
    """The examples in trees of the least total cost, sorted by their tokens.

    Examples are sorted, so that those that share tokens are neighbours, and cut into runs by
    dynamic programming: O(n^2) for n examples.
    """
    if not share:
        return [_Tree((i,), 0, len(example)) for i, example in enumerate(ids)]
    order = sorted(range(len(ids)), key=lambda i: ids[i].tolist())
    common = [_common(ids[a], ids[b]) for a, b in itertools.pairwise(order)]
    best: list[tuple[int, int, int]] = [(0, 0, 0)]  # total cost, begin of the last run, prefix
    for end in range(1, len(order) + 1):
        choices = []
        prefix, total = 0, 0
        for begin in range(end - 1, -1, -1):
            size = len(ids[order[begin]])
            total += size
            # Every example keeps a token of its own.
            single = begin == end - 1
            prefix = size - 1 if single else min(prefix, size - 1, common[begin])
            cost, shared = _cost(end - begin, prefix, total)
            if single or shared:
                choices.append((best[begin][0] + cost, begin, shared))
            if not prefix:
                break
        best.append(min(choices))
    trees = []
    end = len(order)
    while end:
        _, begin, prefix = best[end]
        trees.append(_tree(tuple(order[begin:end]), prefix, ids))
        end = begin
    return trees[::-1]


def _tree(examples: tuple[int, ...], prefix: int, ids: Sequence[Int32s]) -> _Tree:
    """The tree of these examples; a prefix that saves too little is not shared."""
    cost, shared = _cost(len(examples), prefix, sum(len(ids[i]) for i in examples))
    return _Tree(examples, shared, cost)


def _cost(examples: int, prefix: int, tokens: int) -> tuple[int, int]:
    """The cost of examples with ``tokens`` in total, and the length of the prefix they share."""
    saved = (examples - 1) * prefix
    return (tokens - saved + _WORTH_TOKENS, prefix) if saved >= _WORTH_TOKENS else (tokens, 0)


def _split(tree: _Tree, ids: Sequence[Int32s], room: int) -> Iterable[_Tree]:
    """The tree in pieces that cost at most ``room``, each with the prefix."""
    piece: list[int] = []
    tokens = 0
    for i in tree.examples:
        if piece and _cost(len(piece) + 1, tree.prefix, tokens + len(ids[i]))[0] > room:
            yield _tree(tuple(piece), tree.prefix, ids)
            piece, tokens = [], 0
        piece.append(i)
        tokens += len(ids[i])
    yield _tree(tuple(piece), tree.prefix, ids)


def _common(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> int:
    """The length of the common prefix of two arrays of token ids."""
    size = min(len(a), len(b))
    differ = np.flatnonzero(a[:size] != b[:size])
    return int(differ[0]) if len(differ) else size
