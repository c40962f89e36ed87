"""The local training loop: several clients at a time, each with its rows, on the resident base.

All that a client decides for itself stays its own: its rows and their order, its steps and its
learning rate, its loss, its clipping, its optimiser. What is joined is the pass through the
base model, in which the rows of all stand one after the other.
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
from flexlora.training.reparametrized import FormedAdapter

Penalty = Callable[[Mapping[str, Factors], Adapter], Tensor | None]
"""A term of the loss, from the factors as they are and as they were at the start."""


@dataclass(frozen=True)
class ClientTask:
    """What one client brings: an adapter, its rows of the store, and its randomness.

    ``name`` is for errors. ``penalty`` adds a term to its loss at every step. Of ``adapter``
    the ``halves`` are trained, at ``rate`` times the learning rate; ``rest`` is seen by the
    client's rows and left as it is. With a ``form`` its parameters are trained instead.
    ``ranks`` are those of the LoRA scale, where ``adapter`` is some terms of a larger one.
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
    """A trained adapter and what the training took; totals, so that they may be added.

    ``tokens`` are those of the examples, ``computed`` those that went through the model: a
    token that several examples share went once. ``seconds`` is the client's part of the
    clock, by tokens computed, where several trained at a time.
    """

    adapter: Adapter
    steps: int
    examples: int
    tokens: int
    computed: int
    loss_total: float
    loss_tokens: int
    seconds: float


def train(
    base: Base, learner: ClientTask, store: TokenStore, settings: Training, round: int = 1
) -> Trained:
    """Train one client alone; see ``train_together``."""
    return train_together(base, [learner], store, settings, round)[0]


def train_together(
    base: Base,
    learners: Sequence[ClientTask],
    store: TokenStore,
    settings: Training,
    round: int = 1,
) -> list[Trained]:
    """Train the clients at the same time; the base is left as it was.

    The loss of a client's step is the mean over its loss tokens. A step takes its examples
    in packs of at most ``settings.pack_tokens`` tokens and adds up their gradients, so that
    neither the size of packs nor who else is trained changes a client's result, but by
    rounding. A client with fewer steps than others is done before them.

    Raises:
        DataError: a client has no rows, or its loss is not finite (with client and step).
    """
    started = time.perf_counter()
    seats = [_Seat.of(learner, base, settings) for learner in learners]
    for index in range(max((len(seat.plan) for seat in seats), default=0)):
        active = [seat for seat in seats if index < len(seat.plan)]
        with base.training(*(seat.flat.leaves for seat in active)):
            _add_gradients(base, store, active, settings, index)
        for seat in active:
            seat.step(settings, index, round)
    found = [seat.finish(store, settings) for seat in seats]
    computed = sum(trained.computed for trained in found)
    seconds = (time.perf_counter() - started) / max(computed, 1)
    return [replace(trained, seconds=seconds * trained.computed) for trained in found]


@dataclass(eq=False)
class _Seat:
    """One client in training. ``losses`` are those of the step so far, not yet asked for."""

    learner: ClientTask
    flat: FlatAdapter | FormedAdapter
    optimizer: torch.optim.Optimizer
    plan: list[list[int]]
    losses: list[Tensor] = field(default_factory=list)
    loss_total: float = 0.0
    loss_tokens: int = 0
    computed: int = 0

    @classmethod
    def of(cls, learner: ClientTask, base: Base, settings: Training) -> _Seat:
        if len(learner.rows) == 0:
            raise DataError(f"{learner.name} has no rows to train on.")
        flat = _flat(learner, base, settings)
        return cls(learner, flat, settings.make([flat.values]), _plan(learner, settings))

    def step(self, settings: Training, index: int, round: int) -> None:
        """One step of the optimiser, from the gradients that are there."""
        summed = float(torch.stack(self.losses).sum())
        self.losses.clear()
        if not math.isfinite(summed):
            what = f"The training loss of {self.learner.name} is {summed}"
            raise DataError(_out_of_bounds(what, index + 1, settings))
        self.loss_total += summed
        for group in self.optimizer.param_groups:
            group["lr"] = self.learner.rate * settings.rate(index, len(self.plan), round)
        penalty, start = self.learner.penalty, self.learner.adapter
        extra = penalty(self.flat.folded(), start) if penalty is not None else None
        if extra is not None:
            extra.backward()  # type: ignore[no-untyped-call]
        self.flat.gather()
        torch.nn.utils.clip_grad_norm_(self.flat.values, settings.clip_norm)
        self.optimizer.step()
        self.flat.spread()
        self.flat.zero_grad()

    def finish(self, store: TokenStore, settings: Training) -> Trained:
        """What has been trained; the parameters are given up."""
        self.optimizer.state.clear()  # the moments: an optimiser is in a cycle, outlives its name
        adapter = self.flat.finish()
        if not all(f.B.isfinite().all() and f.A.isfinite().all() for f in adapter.values()):
            what = f"The adapter of {self.learner.name} is not finite"
            raise DataError(_out_of_bounds(what, len(self.plan), settings))
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


def _flat(learner: ClientTask, base: Base, settings: Training) -> FlatAdapter | FormedAdapter:
    """What the optimiser works on: the factors, or the parameters that they are made of."""
    if learner.form is not None:
        return FormedAdapter.of(learner.form, base.device, learner.rest)
    return FlatAdapter.of(
        learner.adapter,
        settings.scale,
        base.device,
        learner.halves,
        learner.rest,
        learner.ranks,
    )


def _plan(learner: ClientTask, settings: Training) -> list[list[int]]:
    """The rows of each optimiser step of the turn."""
    plan: list[list[int]] = []
    for _ in range(settings.epochs):
        plan += steps(learner.rows, settings.batch_examples, learner.draw)
        if settings.max_steps is not None and len(plan) >= settings.max_steps:
            return plan[: settings.max_steps]
    return plan


def _add_gradients(
    base: Base, store: TokenStore, seats: Sequence[_Seat], settings: Training, index: int
) -> None:
    """Add up the gradients of one step of every seat, each of its own mean loss."""
    laid = [
        [
            pack(store, rows, settings.prompt_loss, base.shares)
            for rows in packs(store, seat.plan[index], settings.pack_tokens, base.shares)
        ]
        for seat in seats
    ]
    counts = [sum(len(row.labels) for row in rows) for rows in laid]
    for row, edges in _joined(laid, settings.pack_tokens):
        above = settings.recompute_above
        with base.recomputing(above is not None and row.tokens > above):
            nats = label_losses(base, row, edges)
            shares = torch.tensor([1 / max(count, 1) for count in counts])[row.owners]
            (nats * to_device(shares, base.device)).sum().backward()  # type: ignore[no-untyped-call]
        summed = nats.new_zeros(len(seats))
        summed.index_add_(0, to_device(row.owners, base.device), nats.detach())
        for seat, loss in zip(seats, summed, strict=True):
            seat.losses.append(loss)
    for seat, rows, count in zip(seats, laid, counts, strict=True):
        seat.loss_tokens += count
        seat.computed += sum(row.tokens for row in rows)


def _joined(laid: Sequence[Sequence[Pack]], room: int) -> Iterator[tuple[Pack, list[int]]]:
    """The packs of all seats in rows of at most ``room`` tokens, owners being the seats.

    With each row come its edges: the tokens of seat i are from edges[i] to edges[i + 1].
    """
    pieces = [(seat, row) for seat, rows in enumerate(laid) for row in rows]
    for held in first_fit([row.tokens for _, row in pieces], room):
        chosen = [pieces[number] for number in sorted(held)]
        row = join([row for _, row in chosen])
        owners = torch.tensor([seat for seat, _ in chosen])[row.owners]
        tokens = np.zeros(len(laid) + 1, np.int64)
        for seat, part in chosen:
            tokens[seat + 1] += part.tokens
        yield replace(row, owners=owners), np.cumsum(tokens).tolist()


def label_losses(base: Base, row: Pack, edges: Sequence[int] | None = None) -> Tensor:
    """The cross-entropy at each of a row's labels, in nats, in float32."""
    logits = base.logits(row, edges).float()
    return F.cross_entropy(logits, to_device(row.labels, base.device), reduction="none")


def _out_of_bounds(what: str, step: int, settings: Training) -> str:
    return (
        f"{what} at step {step}; lower training.learning_rate (now {settings.learning_rate}) or "
        f"training.alpha (now {settings.alpha})."
    )
