"""The held-out loss: the negative log-likelihood of the responses of evaluation rows."""

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
    """The loss of each example's response, including its end token, in order.

    Examples are packed into rows of at most ``batch_tokens`` (a single longer example is a row
    of its own), in which shared first tokens occur once, and the head runs only on response
    positions. The loss is that of the model with its currently attached adapter.
    """
    if not examples:
        return []
    store = _store(examples)
    totals, counts = np.zeros(len(examples)), np.zeros(len(examples), np.int64)
    with torch.inference_mode():
        for rows in packs(store, range(len(examples)), batch_tokens, base.shares_prefixes):
            packed = pack(store, rows, share=base.shares_prefixes)
            nats = label_losses(base, packed).double().cpu().numpy()
            owners = np.asarray(rows)[packed.owners.numpy()]
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
