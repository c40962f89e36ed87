"""Stores of given rows, and what a forest of segments says, spelt out token by token."""

from collections.abc import Sequence

import numpy as np
import torch

from flexlora.data.packing import Forest
from flexlora.data.tokens import TokenStore


def store_of(rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> TokenStore:
    """A store of these prompts and responses."""
    ids = [[*prompt, *response] for prompt, response in rows]
    return TokenStore(
        np.concatenate([np.array(row, np.int32) for row in ids]),
        np.cumsum([0, *map(len, ids)]),
        np.array([len(prompt) for prompt, _ in rows], np.int32),
        0,
    )


def sharing_store(words: int = 15) -> TokenStore:
    """Nine rows of ids from 3: three share a long instruction, two another, one twice there.

    The instructions share their first token with each other and with a row that stands alone.
    """
    draw = np.random.default_rng(6)
    long, short = ([3, *draw.integers(3, words, size)] for size in (12, 10))

    def row(prefix, rest, response):
        return [*prefix, *draw.integers(3, words, rest)], draw.integers(3, words, response)

    twin = row(short, 1, 3)
    return store_of(
        [
            row(long, 3, 2),
            row([], 5, 1),
            row(short, 2, 4),
            twin,
            row(long, 0, 3),
            row([3], 4, 6),
            twin,
            row(long, 6, 1),
            row([], 2, 7),
        ]
    )


def examples(forest: Forest) -> list[list[int]]:
    """The tokens of each example, its prefix's first, in the row's order.

    A segment that others continue is no example; one that nothing continues is.
    """
    continued = set(forest.prefixes)
    found = []
    for segment, prefix in enumerate(forest.prefixes):
        if segment in continued:
            continue
        before = [] if prefix < 0 else list(range(*forest.edges[prefix : prefix + 2]))
        found.append([*before, *range(*forest.edges[segment : segment + 2])])
    return found


def dense_mask(forest: Forest) -> torch.Tensor:
    """Which token attends to which: itself and what comes before it in its example."""
    tokens = forest.edges[-1]
    allowed = torch.zeros(tokens, tokens, dtype=torch.bool)
    for example in examples(forest):
        for place, query in enumerate(example):
            allowed[query, example[: place + 1]] = True
    return allowed


FORESTS = {
    "one": Forest((0, 5), (-1,)),
    "alone": Forest((0, 4, 5, 12), (-1, -1, -1)),
    "shared": Forest((0, 6, 9, 10, 17), (-1, 0, 0, 0)),
    "mixed": Forest((0, 3, 8, 10, 15, 16, 18, 25, 26), (-1, -1, 1, 1, -1, 4, -1, 6)),
}
"""Rows of examples by name; a segment of one token is among them as prefix and as rest."""
