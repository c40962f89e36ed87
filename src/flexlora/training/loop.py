"""The local training loop, for several clients at a time on one base model.

Each client has its own rows and their order, steps, learning rate, loss, clipping and
optimiser. Only the pass through the base model is shared: it takes the rows of all clients,
one after the other.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from flexlora.data import Pack, TokenStore, first_fit, join, pack, packs, steps
from flexlora.errors import DataError
from flexlora.journal import Meter
from flexlora.lowrank import Adapter, FactorNames, Factors, Parametrization
from flexlora.model import Base, FlatAdapter, to_device
from flexlora.training.concurrency import bytes_to_train, room_bytes
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
    ``adapter`` has only some terms of a larger one. ``store`` and ``settings`` are this task's
    own, where they are not those of all.
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
    store: TokenStore | None = None
    settings: Training | None = None


@dataclass(frozen=True)
class Trained:
    """A trained adapter and the totals of its training.

    ``tokens`` counts the tokens of the examples, ``computed`` those that went through the
    model, where a token shared by several examples counts once. ``loss_total`` is in nats over
    ``loss_tokens`` tokens. ``seconds`` is the client's share of the elapsed time, by tokens
    computed, if several clients trained at a time. ``step_losses`` are the mean losses of the
    steps, in nats per loss token.
    """

    adapter: Adapter
    steps: int
    examples: int
    tokens: int
    computed: int
    loss_total: float
    loss_tokens: int
    seconds: float
    step_losses: tuple[float, ...] = ()


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
    slots = [_Slot.of(task, base, store, settings) for task in tasks]
    count = max((len(slot.plan) for slot in slots), default=0)
    for index in range(count):
        if each_step is not None:
            each_step(index, count)
        active = [slot for slot in slots if not slot.is_over]
        _add_gradients(base, active, settings)
        for slot in active:
            slot.step(round)
    results = [slot.finish() for slot in slots]
    computed = sum(trained.computed for trained in results)
    seconds = (time.perf_counter() - started) / max(computed, 1)
    return [replace(trained, seconds=seconds * trained.computed) for trained in results]


def train_in_turn(
    base: Base,
    tasks: Iterable[ClientTask],
    settings: Training,
    most: int | None = None,
    meter: Meter | None = None,
) -> Iterator[tuple[ClientTask, Trained | DataError]]:
    """Train tasks that have stores and settings of their own; each is yielded when it is over.

    As many train at a time as fill a row of ``settings.pack_tokens`` tokens with one step of
    each, or ``most`` if it is given; when one is over, the next ones begin. They are never more
    than fit in half of the free memory with their training state, but at least one. Who trains
    beside a task changes its result only by rounding. A task whose loss or factors are no longer
    finite is yielded with the error, and the others go on. ``meter`` counts optimiser steps.

    Of ``settings`` only ``pack_tokens`` and ``recompute_above`` are used. ``tasks`` is read as
    they begin. A task without a store or without rows is refused with an error that is raised.
    """
    waiting, active = iter(tasks), list[_Slot]()
    following = next(waiting, None)
    room = room_bytes(base.device)
    while active or following is not None:
        started = time.perf_counter()
        while following is not None and _fits(following, active, base, settings, most, room):
            active.append(_Slot.of(following, base, None, settings))
            following = next(waiting, None)
        before = [slot.computed for slot in active]
        _add_gradients(base, active, settings)
        for slot in active:
            slot.advance()
        computed = [slot.computed - done for slot, done in zip(active, before, strict=True)]
        seconds = (time.perf_counter() - started) / max(sum(computed), 1)
        for slot, tokens in zip(active, computed, strict=True):
            slot.seconds += seconds * tokens
        if meter is not None:
            meter.advance(len(active))
        # No training that is over may be in memory when the next ones begin.
        ended = [(slot.task, slot.timed(slot.outcome)) for slot in active if slot.outcome]
        active = [slot for slot in active if not slot.outcome]
        yield from ended


@dataclass(eq=False)
class _Slot:
    """The training state of one client.

    ``plan`` has the rows of each step, ``done`` of which are done. ``losses`` are those of the
    current step, over ``labels`` tokens, as tensors: reading them on the CPU would wait for the
    device.
    """

    task: ClientTask
    store: TokenStore
    settings: Training
    flat: FlatAdapter | ReparametrizedAdapter
    optimizer: torch.optim.Optimizer
    plan: list[list[int]]
    done: int = 0
    losses: list[Tensor] = field(default_factory=list)
    labels: int = 0
    step_losses: list[float] = field(default_factory=list)
    loss_total: float = 0.0
    loss_tokens: int = 0
    computed: int = 0
    seconds: float = 0.0
    outcome: Trained | DataError | None = None

    @classmethod
    def of(
        cls, task: ClientTask, base: Base, store: TokenStore | None, settings: Training
    ) -> _Slot:
        store, settings = task.store or store, task.settings or settings
        if len(task.rows) == 0:
            raise DataError(
                f"{task.name} has no rows to train on; check the client's data and its splits."
            )
        if store is None:
            raise ValueError(f"{task.name} has no store of tokens, and there is none for all.")
        flat = _flat(task, base, settings)
        optimizer = settings.make([flat.values])
        return cls(task, store, settings, flat, optimizer, _plan(task, settings))

    @property
    def is_over(self) -> bool:
        """Whether all steps are done."""
        return self.done == len(self.plan)

    @property
    def memory_bytes(self) -> int:
        """The memory of this training, see ``bytes_to_train``."""
        return bytes_to_train(self.task.adapter.parameters, self.settings)

    def first_tokens(self, share: bool) -> int:
        """The tokens of the first step, those that examples ``share`` once."""
        return pack(self.store, self.plan[0], share=share).tokens

    def advance(self) -> None:
        """One step of the first round; then there is an outcome if the training is over."""
        try:
            self.step(1)
            self.outcome = self.finish() if self.is_over else None
        except DataError as error:
            self.outcome = error

    def timed(self, outcome: Trained | DataError) -> Trained | DataError:
        """The outcome with the seconds that the training took."""
        return replace(outcome, seconds=self.seconds) if isinstance(outcome, Trained) else outcome

    def step(self, round: int) -> None:
        """One optimiser step from the accumulated gradients."""
        settings = self.settings
        summed = float(torch.stack(self.losses).sum())
        self.losses.clear()
        if not math.isfinite(summed):
            fault = f"The training loss of {self.task.name} is {summed}"
            raise DataError(_diverged(fault, self.done + 1, settings))
        self.loss_total += summed
        self.step_losses.append(summed / max(self.labels, 1))
        for group in self.optimizer.param_groups:
            group["lr"] = self.task.rate * settings.rate(self.done, len(self.plan), round)
        penalty, start = self.task.penalty, self.task.adapter
        extra = penalty(self.flat.folded(), start) if penalty is not None else None
        if extra is not None:
            extra.backward()  # type: ignore[no-untyped-call]
        self.flat.pull_back_gradients()
        torch.nn.utils.clip_grad_norm_(self.flat.values, settings.clip_norm)
        self.optimizer.step()
        self.flat.update_factors()
        self.flat.zero_grad()
        self.done += 1

    def finish(self) -> Trained:
        """The result of the training; frees the optimiser's state and the gradients."""
        # An optimiser is part of a reference cycle, so its moments would stay in memory.
        self.optimizer.state.clear()
        adapter = self.flat.finish()
        if not all(f.B.isfinite().all() and f.A.isfinite().all() for f in adapter.values()):
            fault = f"The adapter of {self.task.name} is not finite"
            raise DataError(_diverged(fault, len(self.plan), self.settings))
        return Trained(
            adapter=adapter,
            steps=len(self.plan),
            examples=sum(len(rows) for rows in self.plan),
            tokens=sum(len(self.store[row]) for rows in self.plan for row in rows),
            computed=self.computed,
            loss_total=self.loss_total,
            loss_tokens=self.loss_tokens,
            seconds=0.0,
            step_losses=tuple(self.step_losses),
        )


def _fits(
    task: ClientTask,
    active: Sequence[_Slot],
    base: Base,
    settings: Training,
    most: int | None,
    room: float,
) -> bool:
    """Whether a task may begin beside the ``active`` ones, of which none may be; all of them in
    ``room`` bytes. See ``train_in_turn``.
    """
    if not active:
        return True
    if most is not None and len(active) >= most:
        return False
    share = base.shares_prefixes
    if most is None and settings.pack_tokens <= sum(slot.first_tokens(share) for slot in active):
        return False
    needed = bytes_to_train(task.adapter.parameters, task.settings or settings)
    return needed + sum(slot.memory_bytes for slot in active) <= room


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


def _add_gradients(base: Base, slots: Sequence[_Slot], settings: Training) -> None:
    """Accumulate the gradients of the next step of every client, each of its own mean loss.

    ``settings`` are those of the rows that the clients share.
    """
    share = base.shares_prefixes
    client_packs = [
        [
            pack(slot.store, rows, slot.settings.prompt_loss, share)
            for rows in packs(slot.store, slot.plan[slot.done], settings.pack_tokens, share)
        ]
        for slot in slots
    ]
    counts = [sum(len(row.labels) for row in rows) for rows in client_packs]
    with base.training(*(slot.flat.leaves for slot in slots)):
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
        slot.labels = count
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
