"""What the model expects: the negative log-likelihood of the responses of held-out rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from flexlora.data import Tokens, TokenStore, pack, packs
from flexlora.model import Base
from flexlora.training import label_losses


@dataclass(frozen=True)
class Loss:
    """One example's loss in nats, summed over its response tokens, and their number."""

    total: float
    tokens: int


def losses(base: Base, examples: Sequence[Tokens], batch_tokens: int) -> list[Loss]:
    """The loss of each example's response, its end token included, in their order.

    Examples are packed into rows of at most ``batch_tokens`` (unless one alone is longer), in
    which first tokens that several share stand once, and the head runs on response
    positions only. The model has the adapter it has now.
    """
    if not examples:
        return []
    store = _store(examples)
    totals, counts = np.zeros(len(examples)), np.zeros(len(examples), np.int64)
    with torch.inference_mode():
        for rows in packs(store, range(len(examples)), batch_tokens, base.shares):
            laid = pack(store, rows, share=base.shares)
            nats = label_losses(base, laid).double().cpu().numpy()
            owners = np.asarray(rows)[laid.owners.numpy()]
            totals += np.bincount(owners, weights=nats, minlength=len(examples))
            counts += np.bincount(owners, minlength=len(examples))
    return [Loss(float(t), int(n)) for t, n in zip(totals, counts, strict=True)]


def _store(examples: Sequence[Tokens]) -> TokenStore:
    return TokenStore(
        ids=np.concatenate([np.empty(0, np.int32), *(tokens.ids for tokens in examples)]),
        offsets=np.cumsum([0, *(len(tokens) for tokens in examples)]),
        prompt_tokens=np.array([tokens.prompt_tokens for tokens in examples], np.int32),
        cut=0,
    )
