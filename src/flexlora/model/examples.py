"""The examples of a packed row, computed one per row by the model's own attention.

For models whose layers let examples of one row affect each other. Costs more than a packed row:
shared first tokens are computed for each example, and shorter examples are padded on the right.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flexlora.data import Pack

_LEAST_SHARE = 0.5
"""An example of a batch has at least this share of the longest one's tokens."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Examples as rows of tokens (examples, longest), padded on the right.

    ``adapter`` is the index of the adapter that applies to all of them. The logits at ``rows``
    and ``places`` (n,) are those of the ``outputs`` (n,), which are indices into the packed row's
    ``loss_positions``.
    """

    adapter: int
    input_ids: Tensor
    attention_mask: Tensor | None
    rows: Tensor
    places: Tensor
    outputs: Tensor


def batches(row: Pack, edges: Sequence[int] | None, padded: bool) -> list[Batch]:
    """The examples of a row, by adapter; one example each unless ``padded``.

    ``edges`` are the bounds of the adapters' tokens, None if one adapter has all. Examples
    without a loss are left out.
    """
    bounds = (0, row.tokens) if edges is None else edges
    examples = [list(spans) for spans in _spans(row)]
    # A shared prefix has the same logits in all its examples: it counts to the first.
    owner = torch.empty(row.tokens, dtype=torch.int64)
    place = torch.empty(row.tokens, dtype=torch.int64)
    for index in reversed(range(len(examples))):
        tokens = torch.cat([torch.arange(a, b) for a, b in examples[index]])
        owner[tokens], place[tokens] = index, torch.arange(len(tokens))
    owners, places = owner[row.loss_positions], place[row.loss_positions]
    result = []
    for adapter, (first, end) in enumerate(itertools.pairwise(bounds)):
        own = [i for i in sorted(set(owners.tolist())) if first <= examples[i][-1][0] < end]
        lengths = {i: sum(b - a for a, b in examples[i]) for i in own}
        for members in _groups(lengths, padded):
            rows = [torch.cat([row.input_ids[0, a:b] for a, b in examples[i]]) for i in members]
            ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
            sizes = torch.tensor([len(each) for each in rows])
            mask = (torch.arange(ids.shape[1]) < sizes[:, None]).long()
            outputs = torch.isin(owners, torch.tensor(members)).nonzero()[:, 0]
            number = {example: index for index, example in enumerate(members)}
            in_batch = torch.tensor([number[i] for i in owners[outputs].tolist()])
            whole = bool(mask.all())
            result.append(
                Batch(adapter, ids, None if whole else mask, in_batch, places[outputs], outputs)
            )
    return result


def logits(
    row: Pack,
    edges: Sequence[int] | None,
    padded: bool,
    compute: Callable[[Batch, Tensor], Tensor],
) -> Tensor:
    """The logits (n, vocabulary) of a row at its ``loss_positions``.

    ``compute`` gives a batch's logits (examples, columns, vocabulary) at the given columns.
    """
    parts, order = [], []
    for batch in batches(row, edges, padded):
        columns, at = torch.unique(batch.places, return_inverse=True)
        found = compute(batch, columns)
        parts.append(found[batch.rows.to(found.device), at.to(found.device)])
        order.append(batch.outputs)
    joined = torch.cat(parts)
    return joined.index_select(0, torch.cat(order).argsort().to(joined.device))


def _spans(row: Pack) -> Iterator[tuple[tuple[int, int], ...]]:
    """The tokens of each example: those of its prefix, if it has one, and its own."""
    for root, *own in row.forest.trees:
        yield from ((root, span) for span in own) if own else [(root,)]


def _groups(lengths: dict[int, int], padded: bool) -> list[list[int]]:
    """The examples in batches, the longest first."""
    groups: list[list[int]] = []
    for example in sorted(lengths, key=lambda i: (-lengths[i], i)):
        room = padded and bool(groups)
        if room and lengths[example] >= _LEAST_SHARE * lengths[groups[-1][0]]:
            groups[-1].append(example)
        else:
            groups.append([example])
    return groups
