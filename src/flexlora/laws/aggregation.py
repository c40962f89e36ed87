"""Laws of the aggregate: exactness, symmetry, and aggregation in parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flexlora.federation import checkpoint
from flexlora.laws import rounds
from flexlora.laws.case import ROUNDING, Case, is_equal, require, require_same
from flexlora.laws.dense import best, product, relative_error
from flexlora.laws.messages import sent
from flexlora.laws.rounds import SHAPES
from flexlora.lowrank import Adapter, Factors
from flexlora.method import Client, Download, Feature, State, partial_step
from flexlora.model import FlatAdapter
from flexlora.seeds import rng


def order_is_irrelevant(case: Case) -> None:
    """The order of clients does not matter."""
    require_same(case.update(case.uploads[::-1]), case.update(case.uploads))


def weights_are_relative(case: Case) -> None:
    """Three times as many examples everywhere change nothing."""
    heavier = [replace(upload, examples=3 * upload.examples) for upload in case.uploads]
    require_same(case.update(heavier), case.update(case.uploads))


def equal_clients_are_a_fixed_point(case: Case) -> None:
    """One client, or three equal ones, of full rank: the update is their model."""
    method = replace(case.method, **case.method.info.lossless)  # type: ignore[type-var]
    client = case.clients[1]
    state = rounds.after_rounds(method, [client], 1, lambda number: rounds.noise(method, number))
    context = rounds.context_of(2, [client])
    turn = rounds.client_turn(method, state, client, context, rounds.noise(method, 2))
    expected = turn.model(rounds.base_updates(state))
    for count in (1, 3):
        uploads = [replace(turn.upload, client=f"c{number}") for number in range(count)]
        after = rounds.aggregated(method, state, uploads, context)
        update = method.global_adapter(after, context)
        for module, model in expected.items():
            error = relative_error(product(update[module]), model)
            require(error < 1e-6, f"{module}, {count} clients: the update is off by {error:.3g}")


def exactness_is_as_declared(case: Case) -> None:
    """Against the dense float64 mean of the clients' whole models, cut to the rank kept."""
    update = case.update(case.uploads)
    errors = [
        relative_error(product(f), best(_dense_mean(case, module), f.rank))
        for module, f in update.items()
    ]
    exact = case.method.info.exact
    require(
        max(errors) < ROUNDING if exact else max(errors) > 1e-3,
        f"declared exact={exact}, but the relative error is {max(errors):.3g}",
    )


def _dense_mean(case: Case, module: str) -> Tensor:
    turns, total = case.turns, torch.zeros(SHAPES[module], dtype=torch.float64)
    if not case.method.info.by_component:
        examples = sum(turn.client.examples for turn in turns)
        for turn in turns:
            model = turn.model(rounds.base_updates(case.state))[module]
            total += turn.client.examples / examples * model
        return total
    for component in range(max(turn.factors[module].rank for turn in turns)):
        trainers = [turn for turn in turns if turn.factors[module].rank > component]
        examples = sum(turn.client.examples for turn in trainers)
        for turn in trainers:
            f = turn.factors[module]
            outer = torch.outer(f.B[:, component], f.A[component])
            total += turn.client.examples / examples * outer
    return total


def the_gauge_is_irrelevant(case: Case) -> None:
    """(B R, R^-1 A) is the same update; a mean of factors needs one R for all clients."""
    method, exact = case.method, case.method.info.exact
    ranks = None if exact else [case.clients[1].ranks] * 3
    clients = rounds.clients_of(method, ranks)
    state = rounds.after_rounds(method, clients, 2, case.noise)
    context, learn = rounds.context_of(3, clients), case.noise(3)

    def rotated(client: Client, start: Download) -> Adapter:
        salt = clients.index(client) if exact else 0
        return Adapter({m: _rotated(f, salt) for m, f in learn(client, start).items()})

    straight, turned = (
        [rounds.client_turn(method, state, c, context, each).upload for c in clients]
        for each in (learn, rotated)
    )
    updates = [
        method.global_adapter(rounds.aggregated(method, state, uploads, context), context)
        for uploads in (straight, turned)
    ]
    require_same(updates[1], updates[0], 1e-8)


def _rotated(f: Factors, salt: int) -> Factors:
    generator = rng(rounds.SEED, "gauge", f.rank, salt)
    R = torch.linalg.qr(torch.from_numpy(generator.normal(size=(f.rank, f.rank)))).Q
    return Factors(f.B @ R, R.T @ f.A)


def the_scale_is_folded(case: Case) -> None:
    """Clients with different LoRA scales but equal products give the same update.

    Through the parameters that a client trains, which have the scale taken out of ``B``.
    """
    uploads = []
    for turn, scale in zip(case.turns, (3.0, 0.7, 1.9), strict=True):
        parameters = FlatAdapter.of(turn.trained, partial(_constant, scale), torch.device("cpu"))
        scaled = replace(turn.turn, trained=parameters.finish().to(torch.float64))
        uploads.append(replace(turn.upload, adapter=case.method.upload_from(scaled)))
    # Parameters in training are float32: a hundred times its rounding.
    require_same(case.update(uploads), case.update(case.uploads), 1e-5)


def _constant(scale: float, rank: int) -> float:
    return scale


APART: rounds.Shapes = {
    "z.q": (11, 7),
    "z.up": (13, 5),
    "a.q": (12, 9),
    "m.down": (8, 10),
    "b.k": (6, 14),
    "c.v": (15, 4),
}
"""Modules in an order that is not that of their names, in which a checkpoint's are read."""


def parts_are_the_whole(case: Case) -> None:
    """However the modules are split, from memory and from the disk, aggregation is the same."""
    method = case.method
    mixed = ((2, 1, 2, 3, 1, 2), (3, 4, 2, 2, 3, 1), (5, 3, 4, 4, 2, 4))
    ranks = mixed if Feature.MIXED_RANKS in method.features else [mixed[0]] * 3
    clients = rounds.clients_of(method, [dict(zip(APART, each, strict=True)) for each in ranks])
    state = rounds.first_state(method, clients, APART)
    private: dict[str, Mapping[str, Adapter]] = {client.id: {} for client in clients}
    for number in (1, 2, 3, 4):
        context, learn = rounds.context_of(number, clients, APART), case.noise(number)
        turns = [
            rounds.client_turn(method, state, c, context, learn, private[c.id]) for c in clients
        ]
        private = {turn.client.id: turn.private for turn in turns}
        uploads = [sent(t.upload, case.folder / t.client.id, torch.float32) for t in turns]
        cohort = rounds.cohort_of(method, uploads, context)
        whole, modules = method.aggregate(state, cohort, context), list(context.ranks)
        for split in ([[m] for m in modules], [modules[1::2], modules[::2][::-1]], [modules]):
            parts = [partial_step.aggregate(method, state, cohort, context, part) for part in split]
            _require_equal_states(partial_step.joined(state, parts, context), whole)
        state = whole if number % 2 else checkpoint.save(case.folder, number, 0, whole).state


def _require_equal_states(joined: State, whole: State) -> None:
    pairs: list[tuple[str, Any, Any]] = [
        ("per_module", joined.per_module, whole.per_module),
        ("per_client", joined.per_client, whole.per_client),
        ("merged_until", joined.merge_log.merged_until, whole.merge_log.merged_until),
        ("memory", list(joined.memory), list(whole.memory)),
        ("updates", list(joined.merge_log.updates), list(whole.merge_log.updates)),
    ]
    for name, value, expected in pairs:
        require(value == expected, f"{name} differs")
    adapters = [(joined.model, whole.model)]
    adapters += [(joined.memory[name], whole.memory[name]) for name in whole.memory]
    updates = whole.merge_log.updates
    adapters += [(joined.merge_log.updates[n], updates[n]) for n in updates]
    for adapter, expected in adapters:
        require(set(adapter) == set(expected), "the modules differ")
        for module, f in expected.items():
            require(is_equal(adapter[module], f), f"{module} differs")
