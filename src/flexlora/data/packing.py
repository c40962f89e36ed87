"""Examples laid in one row of tokens, without padding and without saying anything twice.

A row is a forest. A segment of tokens either begins an example or continues another segment,
its prefix: the first tokens of several examples, which stand in the row once. Rows of one
client often share a long instruction, so that a row has two to three times fewer tokens than
its examples; whatever is computed of a shared token is the same for all of them.
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

from flexlora.data.tokens import Int32s, Int64s, TokenStore
from flexlora.errors import DataError

_WORTH_TOKENS: Final = 8
"""What a shared prefix must save: about the cost of the attention calls that it adds."""

_BLOCK_TOKENS: Final = 512
"""About how many tokens one masked attention call takes."""


@dataclass(frozen=True)
class Forest:
    """Segments of a row: where each begins and ends, and the segment it continues (or -1).

    Segments are bounded by ``edges``, one more than there are segments. A prefix continues
    nothing itself, and the segments that continue it follow it at once.

    Raises:
        DataError: a segment is empty or continues what it cannot.
    """

    edges: tuple[int, ...]
    prefixes: tuple[int, ...]

    def __post_init__(self) -> None:
        bounds = itertools.pairwise(self.edges)
        sized = self.edges[:1] == (0,) and len(self.edges) == len(self.prefixes) + 1
        if not sized or any(b <= a for a, b in bounds):
            raise DataError(f"Edges {self.edges} do not bound {len(self.prefixes)} segments.")
        for index, prefix in enumerate(self.prefixes):
            if prefix != -1 and (index == 0 or prefix != self.root(index - 1)):
                raise DataError(f"Segment {index} cannot continue segment {prefix}.")

    def root(self, segment: int) -> int:
        """The segment with which this one's tree begins."""
        return segment if self.prefixes[segment] < 0 else self.prefixes[segment]

    @cached_property
    def trees(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        """The segments (first, end) by tree; the prefix, if there is one, is the first."""
        found: list[list[tuple[int, int]]] = []
        for span, prefix in zip(itertools.pairwise(self.edges), self.prefixes, strict=True):
            if prefix < 0:
                found.append([])
            found[-1].append(span)
        return tuple(tuple(tree) for tree in found)

    @property
    def longest(self) -> int:
        """The tokens of the longest example, its prefix included."""
        rest = [max((b - a for a, b in tree[1:]), default=0) for tree in self.trees]
        return max(t[0][1] - t[0][0] + r for t, r in zip(self.trees, rest, strict=True))

    def mask(self, first: int, end: int) -> Tensor:
        """Which token of these rows (queries) attends to which (keys), (n, n) of bool."""
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
        """Whole trees in runs of about ``_BLOCK_TOKENS`` tokens, each with its mask."""
        bounds = [0]
        for tree in self.trees:
            if tree[-1][1] - bounds[-1] > _BLOCK_TOKENS and tree[0][0] > bounds[-1]:
                bounds.append(tree[0][0])
        pairs = itertools.pairwise([*bounds, self.edges[-1]])
        return tuple((first, end, self.mask(first, end)) for first, end in pairs)


@dataclass(frozen=True, eq=False)
class Pack:
    """Several examples in one row of T tokens, as a model takes them.

    ``input_ids`` and ``position_ids`` are (1, T); an example's positions begin at 0 and run on
    from its prefix. The n places of the loss are ``loss_positions`` (n,), the tokens that
    should follow there ``labels`` (n,), and the examples they belong to ``owners`` (n,), as
    indices into the examples that were packed. A place in a shared prefix may stand there for
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
        """How many tokens the row holds, all of them real, shared ones counted once."""
        return self.input_ids.shape[1]


@dataclass(frozen=True)
class _Tree:
    """Examples (by their index) that share their first ``prefix`` tokens.

    The ``cost`` is their tokens, shared ones once, and ``_WORTH_TOKENS`` for a prefix.
    """

    examples: tuple[int, ...]
    prefix: int
    cost: int


def steps(
    indices: Sequence[int] | Int64s, examples_per_step: int, rng: np.random.Generator
) -> list[list[int]]:
    """One epoch over ``indices``: the rows of each optimiser step, of which the last may be few.

    Raises:
        DataError: a step would be empty by order.
    """
    if examples_per_step < 1:
        raise DataError(f"Steps of {examples_per_step} examples hold nothing; give at least 1.")
    shuffled = rng.permutation(np.asarray(indices, np.int64)).tolist()
    starts = range(0, len(shuffled), examples_per_step)
    return [shuffled[start : start + examples_per_step] for start in starts]


def packs(
    store: TokenStore, rows: Sequence[int], tokens_per_pack: int, share: bool = True
) -> list[list[int]]:
    """The rows dealt to packs of at most so many tokens, unless one row alone has more.

    What shares a prefix stays together as far as it fits; the largest is placed first, each
    into the first pack with room (first-fit decreasing).

    Raises:
        DataError: a pack would be empty by order.
    """
    if tokens_per_pack < 1:
        raise DataError(f"Packs of {tokens_per_pack} tokens hold nothing; give at least 1.")
    ids = [store[row].ids for row in rows]
    pieces = [p for tree in _trees(ids, share) for p in _split(tree, ids, tokens_per_pack)]
    # By cost, not by tokens: of any rows ``pack`` finds trees that cost no more than these.
    bins = first_fit([piece.cost for piece in pieces], tokens_per_pack)
    return [[rows[i] for number in held for i in pieces[number].examples] for held in bins]


def pack(
    store: TokenStore, rows: Sequence[int], prompt_loss: bool = False, share: bool = True
) -> Pack:
    """These rows of the store in one row of tokens.

    The loss is over the response tokens; with ``prompt_loss`` over every token but each
    example's first, which nothing precedes. Without ``share`` no two examples share a token.

    Raises:
        DataError: there are no rows.
    """
    if not len(rows):
        raise DataError("A pack of no examples has no tokens; give at least one row.")
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
            whole, begin = examples[i], edges[-1]
            segments.append((whole.ids[shared:], shared))
            edges.append(begin + len(whole) - shared)
            prefixes.append(root if shared else -1)
            at = np.arange(0 if prompt_loss else whole.prompt_tokens - 1, len(whole) - 1)
            place = np.where(at < shared, edges[root] + at, begin + at - shared)
            losses.append(np.stack([place, whole.ids[at + 1], np.full_like(at, i)]))
    input_ids = np.concatenate([part for part, _ in segments]).astype(np.int64)
    positions = np.concatenate([np.arange(len(part)) + first for part, first in segments])
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
    """Several packs one after the other, as one; owners are the packs' indices."""
    starts = np.cumsum([0, *(row.tokens for row in rows)]).tolist()
    edges: list[int] = [0]
    prefixes: list[int] = []
    for row in rows:
        before, start = len(prefixes), edges[-1]
        prefixes += [p if p < 0 else p + before for p in row.forest.prefixes]
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
    """Indices of ``sizes`` in bins, the largest first, each into the first bin with room."""
    bins: list[list[int]] = []
    filled: list[int] = []
    for item in np.argsort(-np.asarray(sizes, np.int64), kind="stable").tolist():
        for number, held in enumerate(filled):
            if held + sizes[item] <= room:
                bins[number].append(item)
                filled[number] += sizes[item]
                break
        else:
            bins.append([item])
            filled.append(sizes[item])
    return bins


def _trees(ids: Sequence[Int32s], share: bool) -> list[_Tree]:
    """The examples in trees with the fewest tokens in all, by their first tokens' order.

    Examples are sorted, so that any that share tokens are neighbours, and cut into runs by
    dynamic programming: O(n^2) for n examples.
    """
    if not share:
        return [_Tree((i,), 0, len(part)) for i, part in enumerate(ids)]
    order = sorted(range(len(ids)), key=lambda i: ids[i].tolist())
    common = [_common(ids[a], ids[b]) for a, b in itertools.pairwise(order)]
    best: list[tuple[int, int, int]] = [(0, 0, 0)]  # cost up to here, begin of the run, prefix
    for end in range(1, len(order) + 1):
        choices = []
        prefix, total = 0, 0
        for begin in range(end - 1, -1, -1):
            size = len(ids[order[begin]])
            total += size
            # Every example keeps a token of its own.
            alone = begin == end - 1
            prefix = size - 1 if alone else min(prefix, size - 1, common[begin])
            cost, shared = _cost(end - begin, prefix, total)
            if alone or shared:
                choices.append((best[begin][0] + cost, begin, shared))
            if not prefix:
                break
        best.append(min(choices))
    found = []
    end = len(order)
    while end:
        _, begin, prefix = best[end]
        found.append(_tree(tuple(order[begin:end]), prefix, ids))
        end = begin
    return found[::-1]


def _tree(examples: tuple[int, ...], prefix: int, ids: Sequence[Int32s]) -> _Tree:
    """The tree of these examples; a prefix that is not worth it is not shared."""
    cost, shared = _cost(len(examples), prefix, sum(len(ids[i]) for i in examples))
    return _Tree(examples, shared, cost)


def _cost(examples: int, prefix: int, tokens: int) -> tuple[int, int]:
    """What so many examples of so many tokens cost, and how many first tokens they share."""
    saved = (examples - 1) * prefix
    return (tokens - saved + _WORTH_TOKENS, prefix) if saved >= _WORTH_TOKENS else (tokens, 0)


def _split(tree: _Tree, ids: Sequence[Int32s], room: int) -> Iterable[_Tree]:
    """The tree in pieces that have room, each with the prefix."""
    held: list[int] = []
    tokens = 0
    for i in tree.examples:
        if held and _cost(len(held) + 1, tree.prefix, tokens + len(ids[i]))[0] > room:
            yield _tree(tuple(held), tree.prefix, ids)
            held, tokens = [], 0
        held.append(i)
        tokens += len(ids[i])
    yield _tree(tuple(held), tree.prefix, ids)


def _common(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> int:
    """How many first tokens two examples share."""
    size = min(len(a), len(b))
    differ = np.flatnonzero(a[:size] != b[:size])
    return int(differ[0]) if len(differ) else size
