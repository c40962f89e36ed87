"""The local training loop, for several clients at a time on one base model.

Each client has its own rows and their order, steps, learning rate, loss, clipping and
optimiser. Only the pass through the base model is shared: it takes the rows of all clients,
one after the other.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from flexlora.data import Pack, TokenStore, first_fit, join, pack, packs, steps
from flexlora.errors import DataError
from flexlora.lowrank import Adapter, FactorNames, Factors, Parametrization
from flexlora.model import Base, FlatAdapter, to_device
from flexlora.training.optimizer import Training
from flexlora.training.reparametrized import ReparametrizedAdapter

Penalty = Callable[[Mapping[str, Factors], Adapter], Tensor | None]
"""An additional term of the loss, from the current factors and the initial adapter."""


EachStep = Callable[[int, int], None]
"""Called before each step, with the number of steps that are done and of all steps."""


@dataclass(frozen=True)
class ClientTask:
    """One client's local training: an initial adapter, rows of the store, and a generator.

    ``name`` is for errors. ``penalty`` adds a term to the loss of every step. The ``halves`` of
    ``adapter`` are trained, at ``rate`` times the learning rate; ``rest`` is a frozen adapter
    that is added to the base model for this client. With a ``form`` its parameters are trained
    instead of the factors. ``ranks`` are the ranks from which the LoRA scale is computed, if
    ``adapter`` has only some terms of a larger one.
    """

    name: str
    adapter: Adapter
    rows: Sequence[int]
    draw: np.random.Generator
    penalty: Penalty | None = None
    rest: Adapter | None = None
    halves: FactorNames = "BA"
    rate: float = 1.0
    form: Mapping[str, Parametrization] | None = None
    ranks: Mapping[str, int] | None = None


@dataclass(frozen=True)
class Trained:
    """A trained adapter and the totals of its training.

    ``tokens`` counts the tokens of the examples, ``computed`` those that went through the
    model, where a token shared by several examples counts once. ``loss_total`` is in nats over
    ``loss_tokens`` tokens. ``seconds`` is the client's share of the elapsed time, by tokens
    computed, if several clients trained at a time.
    """

    adapter: Adapter
    steps: int
    examples: int
    tokens: int
    computed: int
    loss_total: float
    loss_tokens: int
    seconds: float


def train_together(
    base: Base,
    tasks: Sequence[ClientTask],
    store: TokenStore,
    settings: Training,
    round: int = 1,
    each_step: EachStep | None = None,
) -> list[Trained]:
    """Train the clients at the same time; the base model is unchanged afterwards.

    The loss of a client's step is the mean over its loss tokens. A step takes its examples in
    packs of at most ``settings.pack_tokens`` tokens and adds up their gradients, so that the
    size of packs and the other clients change a client's result only by rounding. A client
    with fewer steps than others stops earlier. ``round`` counts from 1. ``each_step`` may end the
    training by an exception.

    Raises:
        DataError: a client has no rows, or its loss or adapter is not finite (names the client
            and the step).
    """
    started = time.perf_counter()
    slots = [_Slot.of(task, base, settings) for task in tasks]
    count = max((len(slot.plan) for slot in slots), default=0)
    for index in range(count):
        if each_step is not None:
            each_step(index, count)
        active = [slot for slot in slots if index < len(slot.plan)]
        with base.training(*(slot.flat.leaves for slot in active)):
            _add_gradients(base, store, active, settings, index)
        for slot in active:
            slot.step(settings, index, round)
    results = [slot.finish(store, settings) for slot in slots]
    computed = sum(trained.computed for trained in results)
    seconds = (time.perf_counter() - started) / max(computed, 1)
    return [replace(trained, seconds=seconds * trained.computed) for trained in results]


@dataclass(eq=False)
class _Slot:
    """The training state of one client.

    ``plan`` has the rows of each step. ``losses`` are those of the current step, as tensors:
    reading them on the CPU would wait for the device.
    """

    task: ClientTask
    flat: FlatAdapter | ReparametrizedAdapter
    optimizer: torch.optim.Optimizer
    plan: list[list[int]]
    losses: list[Tensor] = field(default_factory=list)
    loss_total: float = 0.0
    loss_tokens: int = 0
    computed: int = 0

    @classmethod
    def of(cls, task: ClientTask, base: Base, settings: Training) -> _Slot:
        if len(task.rows) == 0:
            raise DataError(
                f"{task.name} has no rows to train on; check the client's data and its splits."
            )
        flat = _flat(task, base, settings)
        return cls(task, flat, settings.make([flat.values]), _plan(task, settings))

    def step(self, settings: Training, index: int, round: int) -> None:
        """One optimiser step from the accumulated gradients."""
        summed = float(torch.stack(self.losses).sum())
        self.losses.clear()
        if not math.isfinite(summed):
            fault = f"The training loss of {self.task.name} is {summed}"
            raise DataError(_diverged(fault, index + 1, settings))
        self.loss_total += summed
        for group in self.optimizer.param_groups:
            group["lr"] = self.task.rate * settings.rate(index, len(self.plan), round)
        penalty, start = self.task.penalty, self.task.adapter
        extra = penalty(self.flat.folded(), start) if penalty is not None else None
        if extra is not None:
            extra.backward()  # type: ignore[no-untyped-call]
        self.flat.pull_back_gradients()
        torch.nn.utils.clip_grad_norm_(self.flat.values, settings.clip_norm)
        self.optimizer.step()
        self.flat.update_factors()
        self.flat.zero_grad()

    def finish(self, store: TokenStore, settings: Training) -> Trained:
        """The result of the training; frees the optimiser's state and the gradients."""
        # An optimiser is part of a reference cycle, so its moments would stay in memory.
        self.optimizer.state.clear()
        adapter = self.flat.finish()
        if not all(f.B.isfinite().all() and f.A.isfinite().all() for f in adapter.values()):
            fault = f"The adapter of {self.task.name} is not finite"
            raise DataError(_diverged(fault, len(self.plan), settings))
        return Trained(
            adapter=adapter,
            steps=len(self.plan),
            examples=sum(len(rows) for rows in self.plan),
            tokens=sum(len(store[row]) for rows in self.plan for row in rows),
            computed=self.computed,
            loss_total=self.loss_total,
            loss_tokens=self.loss_tokens,
            seconds=0.0,
        )


def _flat(task: ClientTask, base: Base, settings: Training) -> FlatAdapter | ReparametrizedAdapter:
    """The trainable parameters: the factors, or those of the parametrization."""
    if task.form is not None:
        return ReparametrizedAdapter.of(task.form, base.device, task.rest)
    return FlatAdapter.of(
        task.adapter,
        settings.scale,
        base.device,
        task.halves,
        task.rest,
        task.ranks,
    )


def _plan(task: ClientTask, settings: Training) -> list[list[int]]:
    """The rows of each optimiser step of the client's local training."""
    plan: list[list[int]] = []
    for _ in range(settings.epochs):
        plan += steps(task.rows, settings.batch_examples, task.draw)
        if settings.max_steps is not None and len(plan) >= settings.max_steps:
            return plan[: settings.max_steps]
    return plan


def _add_gradients(
    base: Base, store: TokenStore, slots: Sequence[_Slot], settings: Training, index: int
) -> None:
    """Accumulate the gradients of one step of every client, each of its own mean loss."""
    share = base.shares_prefixes
    client_packs = [
        [
            pack(store, rows, settings.prompt_loss, share)
            for rows in packs(store, slot.plan[index], settings.pack_tokens, share)
        ]
        for slot in slots
    ]
    counts = [sum(len(row.labels) for row in rows) for rows in client_packs]
    for row, edges in _joined(client_packs, settings.pack_tokens):
        above = settings.recompute_above
        with base.recomputing(above is not None and row.tokens > above):
            nats = label_losses(base, row, edges)
            weights = torch.tensor([1 / max(count, 1) for count in counts])[row.owners]
            (nats * to_device(weights, base.device)).sum().backward()  # type: ignore[no-untyped-call]
        summed = nats.new_zeros(len(slots))
        summed.index_add_(0, to_device(row.owners, base.device), nats.detach())
        for slot, loss in zip(slots, summed, strict=True):
            slot.losses.append(loss)
    for slot, rows, count in zip(slots, client_packs, counts, strict=True):
        slot.loss_tokens += count
        slot.computed += sum(row.tokens for row in rows)


def _joined(client_packs: Sequence[Sequence[Pack]], room: int) -> Iterator[tuple[Pack, list[int]]]:
    """The packs of all clients in rows of at most ``room`` tokens, with client indices as owners.

    Each row comes with its edges: client i has the tokens from edges[i] to edges[i + 1].
    """
    pieces = [(client, row) for client, rows in enumerate(client_packs) for row in rows]
    for members in first_fit([row.tokens for _, row in pieces], room):
        chosen = [pieces[piece] for piece in sorted(members)]
        row = join([row for _, row in chosen])
        owners = torch.tensor([client for client, _ in chosen])[row.owners]
        tokens = np.zeros(len(client_packs) + 1, np.int64)
        for client, piece in chosen:
            tokens[client + 1] += piece.tokens
        yield replace(row, owners=owners), np.cumsum(tokens).tolist()


def label_losses(base: Base, row: Pack, edges: Sequence[int] | None = None) -> Tensor:
    """The cross-entropy (n,) at each of a row's n labels, in nats, in float32.

    ``edges`` are the bounds of each adapter's tokens, see ``Base.logits``.
    """
    logits = base.logits(row, edges).float()
    return F.cross_entropy(logits, to_device(row.labels, base.device), reduction="none")


def _diverged(fault: str, step: int, settings: Training) -> str:
    return (
        f"{fault} at step {step}; lower training.learning_rate (now {settings.learning_rate}) or "
        f"training.alpha (now {settings.alpha})."
    )
