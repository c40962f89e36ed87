"""Rows that a client holds out of its training, and the loss of an adapter on them.

The same in a simulation and on a client's own machine: the rows depend on the seed, the client's
name and its own rows only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from flexlora.errors import ConfigError
from flexlora.evaluation import losses
from flexlora.federation.client_turn import ClientRuntime
from flexlora.lowrank import Adapter, Factors
from flexlora.seeds import rng

Int64s = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class HoldoutLoss:
    """The loss of an adapter on a client's held-out rows: a sum in nats over response tokens."""

    examples: int
    loss_total: float
    loss_tokens: int


def drawn(count: int, share: float, seed: int, client: str) -> Int64s:
    """Which of a client's ``count`` rows it holds out, ascending: a ``share`` of them, at random.

    At least one, and at least one remains for training; of a single row none is held out.
    """
    held = min(max(round(share * count), 1), count - 1) if share and count else 0
    return np.sort(rng(seed, "holdout", client).permutation(count)[:held])


def holdout_loss(
    runtime: ClientRuntime, client: str, adapter: Adapter, most_rows: int
) -> HoldoutLoss:
    """The loss of the base model with an adapter on at most so many of a client's held-out rows.

    These are the same rows every time. ``adapter`` is relative to the untouched base; one without
    modules stands for the base. Rows are packed as in training.

    Raises:
        ConfigError: the loss is not finite.
        AdapterError: the adapter does not fit the model.
    """
    rows = _evaluated(runtime.holdout[client], most_rows, runtime.seed, client)
    with runtime.base.attached(_as_it_travels(adapter)):
        examples = [runtime.store[row] for row in rows]
        scores = losses(runtime.base, examples, runtime.training.pack_tokens)
    total = math.fsum(score.total for score in scores)
    if not math.isfinite(total):
        raise ConfigError(
            f"The loss on the held-out rows of client {client!r} is {total}, so training has "
            "diverged or overflowed; lower training.learning_rate, or set model.dtype to "
            "'float32'."
        )
    return HoldoutLoss(len(rows), total, sum(score.tokens for score in scores))


def _as_it_travels(adapter: Adapter) -> dict[str, Factors]:
    """The factors in the dtype and the layout in memory that a message has.

    The order in which a product is summed depends on the layout.
    """
    dtype = torch.float32
    return {
        module: Factors(factors.B.to(dtype).contiguous(), factors.A.to(dtype).contiguous())
        for module, factors in adapter.items()
    }


def _evaluated(rows: Sequence[int], most: int, seed: int, client: str) -> list[int]:
    """At most so many of the rows, ascending."""
    places = rng(seed, "evaluated holdout", client).permutation(len(rows))[:most]
    return [int(rows[place]) for place in np.sort(places)]
