"""The local training loop: one client's rows, one adapter, the resident base."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from flexlora.adapter import Adapter, Factors
from flexlora.data.tokens import Pack, TokenStore, pack, steps
from flexlora.model import Base
from flexlora.training.flat import FlatAdapter
from flexlora.training.optimizer import Training

Penalty = Callable[[Mapping[str, Factors]], Tensor | None]


@dataclass(frozen=True)
class Trained:
    """A trained adapter and what the training took; totals, so that they may be added."""

    adapter: Adapter
    steps: int
    examples: int
    tokens: int
    loss_total: float
    loss_tokens: int
    seconds: float


def train(
    base: Base,
    adapter: Adapter,
    store: TokenStore,
    rows: Sequence[int],
    settings: Training,
    draw: np.random.Generator,
    round: int = 1,
    penalty: Penalty | None = None,
) -> Trained:
    """Train ``adapter`` on the rows of ``store`` and return it; the base is left as it was.

    The loss of a step is the mean over its loss tokens. An optimiser step takes its
    examples in packs, rows without padding of at most ``settings.pack_tokens`` tokens, and
    adds up their gradients, so that the pack size does not change the result.

    Raises:
        ValueError: there are no rows, or the loss is not finite (with the step).
    """
    if len(rows) == 0:
        raise ValueError("There are no rows to train on.")
    started = time.perf_counter()
    plan = _plan(store, rows, settings, draw)
    total = np.zeros(3)
    flat = FlatAdapter.of(adapter, settings.scale, base.device)
    del adapter  # and with it the memory, if the caller holds no other reference
    optimizer = settings.make([flat.values])
    with base.training(flat):
        for index, packs in enumerate(plan):
            for group in optimizer.param_groups:
                group["lr"] = settings.rate(index, len(plan), round)
            total += _step(base, store, packs, settings, index)
            extra = penalty(flat.folded()) if penalty is not None else None
            if extra is not None:
                extra.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(flat.values, settings.clip_norm)
            optimizer.step()
            flat.zero_grad()
    optimizer.state.clear()  # the moments: an optimiser is in a cycle and outlives its name
    trained = flat.finish()
    if not all(f.B.isfinite().all() and f.A.isfinite().all() for f in trained.values()):
        raise ValueError(_out_of_bounds("The adapter is not finite", len(plan), settings))
    return Trained(
        adapter=trained,
        steps=len(plan),
        examples=sum(len(indices) for packs in plan for indices in packs),
        tokens=int(total[2]),
        loss_total=float(total[0]),
        loss_tokens=int(total[1]),
        seconds=time.perf_counter() - started,
    )


def _plan(
    store: TokenStore, rows: Sequence[int], settings: Training, draw: np.random.Generator
) -> list[list[list[int]]]:
    """The optimiser steps of the turn, each a list of packs of row indices."""
    plan: list[list[list[int]]] = []
    for _ in range(settings.epochs):
        plan += steps(store.lengths, rows, settings.batch_examples, settings.pack_tokens, draw)
        if settings.max_steps is not None and len(plan) >= settings.max_steps:
            return plan[: settings.max_steps]
    return plan


def _step(
    base: Base, store: TokenStore, packs: list[list[int]], settings: Training, index: int
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Add up the gradients of one step; returns its summed loss, loss tokens and tokens."""
    laid = [pack(store, rows, prompt_loss=settings.prompt_loss) for rows in packs]
    count = sum(len(row.labels) for row in laid)
    summed = 0.0
    for row in laid:
        above = settings.recompute_above
        with base.recomputing(above is not None and row.tokens > above):
            loss = pack_loss(base, row)
            (loss / count).backward()  # type: ignore[no-untyped-call]
        summed += float(loss.detach())
    if not math.isfinite(summed):
        raise ValueError(_out_of_bounds(f"The training loss is {summed}", index + 1, settings))
    return np.array([summed, count, sum(row.tokens for row in laid)])


def _out_of_bounds(what: str, step: int, settings: Training) -> str:
    return (
        f"{what} at step {step}; lower training.learning_rate (now {settings.learning_rate}) or "
        f"training.alpha (now {settings.alpha})."
    )


def pack_loss(base: Base, row: Pack) -> Tensor:
    """The summed cross-entropy of one pack's labels, in float32."""
    device = base.device
    logits = base.logits(
        row.input_ids.to(device),
        row.position_ids.to(device),
        row.starts.to(device),
        row.loss_positions.to(device),
    )
    return F.cross_entropy(logits.float(), row.labels.to(device), reduction="sum")
