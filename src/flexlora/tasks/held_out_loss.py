"""What the model expects: the negative log-likelihood of the responses of held-out rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from flexlora.data.tokens import Pack, Tokens, TokenStore, pack
from flexlora.model import Base


@dataclass(frozen=True)
class Loss:
    """One example's loss in nats, summed over its response tokens, and their number."""

    total: float
    tokens: int


def losses(base: Base, examples: Sequence[Tokens], batch_tokens: int) -> list[Loss]:
    """The loss of each example's response, its end token included, in their order.

    Examples are packed into rows of at most ``batch_tokens`` (unless one alone is longer),
    and the head runs on response positions only. The model has the adapter it has now.
    """
    store = _store(examples)
    found: list[Loss] = []
    with torch.inference_mode():
        for rows in _packs([len(tokens) for tokens in examples], batch_tokens):
            found += _pack_losses(base, pack(store, rows))
    return found


def _pack_losses(base: Base, row: Pack) -> list[Loss]:
    device = base.device
    logits = base.logits(
        row.input_ids.to(device),
        row.position_ids.to(device),
        row.starts.to(device),
        row.loss_positions.to(device),
    )
    nats = F.cross_entropy(logits.float(), row.labels.to(device), reduction="none").cpu()
    example = (torch.searchsorted(row.starts, row.loss_positions, right=True) - 1).numpy()
    examples = len(row.starts) - 1
    totals = np.bincount(example, weights=nats.double().numpy(), minlength=examples)
    counts = np.bincount(example, minlength=examples)
    return [Loss(float(t), int(n)) for t, n in zip(totals, counts, strict=True)]


def _store(examples: Sequence[Tokens]) -> TokenStore:
    return TokenStore(
        ids=np.concatenate([np.empty(0, np.int32), *(tokens.ids for tokens in examples)]),
        offsets=np.cumsum([0, *(len(tokens) for tokens in examples)]),
        prompt_tokens=np.array([tokens.prompt_tokens for tokens in examples], np.int32),
        cut=0,
    )


def _packs(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Rows in their order, as many to a pack as there is room for."""
    packs: list[list[int]] = []
    filled = room
    for row, length in enumerate(lengths):
        if not packs or filled + length > room:
            packs.append([])
            filled = 0
        packs[-1].append(row)
        filled += length
    return packs
