"""A server step in parts; that every method's is the whole one is a law (laws/laws.py)."""

import dataclasses

import pytest
import torch

from flexlora import methods, wire
from flexlora.federation import checkpoint
from flexlora.laws.rounds import (
    SHAPES,
    after_rounds,
    client_turn,
    clients_of,
    cohort_of,
    context_of,
    noise,
)
from flexlora.lowrank.factors import Adapter, Factors
from flexlora.method import partial_step
from flexlora.method.interface import Feature, RoundContext, State
from flexlora.method.merge_log import MergeLog
from flexlora.method.regularizers.fedprox import FedProx
from flexlora.method.regularizers.scaffold import Scaffold
from flexlora.method.server_optimizer import with_server_optimizer
from flexlora.method.server_optimizers.fedadam import FedAdam
from flexlora.method.server_optimizers.fedavgm import FedAvgM
from flexlora.training.optimizer import Training
from support.states import assert_same_state

SGD = Training(optimizer="sgd", weight_decay=0.0)


def made(name, **options):
    return methods.make(name, options)


def played(method, clients, rounds):
    return after_rounds(method, clients, rounds, lambda number: noise(method, number))


def cohort_in(method, state, clients, number):
    """The uploads of a round, and its context."""
    context, learn = context_of(number, clients), noise(method, number)
    uploads = [client_turn(method, state, c, context, learn).upload for c in clients]
    return cohort_of(method, uploads, context), context


@pytest.mark.parametrize(
    "method",
    [
        with_server_optimizer(made("flexlora"), FedAdam()),
        with_server_optimizer(made("raflora"), FedAvgM()),
        FedProx().wrap(made("flexfold"), SGD),
    ],
    ids=lambda method: method.title,
)
def test_a_method_within_another_goes_by_module_too(method):
    clients = clients_of(method)
    state = played(method, clients, 2)
    cohort, context = cohort_in(method, state, clients, 3)
    want = method.aggregate(state, cohort, context)
    assert Feature.PER_MODULE in method.features
    parts = [partial_step.aggregate(method, state, cohort, context, [m]) for m in SHAPES]
    assert_same_state(partial_step.joined(state, parts, context), want)


def test_controls_beside_the_factors_are_not_of_modules():
    assert Feature.PER_MODULE not in Scaffold().wrap(made("fedit"), SGD).features


def test_a_log_of_merged_updates_stays_on_the_disk(tmp_path):
    method = made("flora")
    clients = clients_of(method)
    state = checkpoint.save(tmp_path, 1, 0, played(method, clients, 1)).state
    cohort, context = cohort_in(method, state, clients, 2)
    parts = [partial_step.aggregate(method, state, cohort, context, [m]) for m in SHAPES]
    after = partial_step.joined(state, parts, context)
    assert wire.stored_at(after.merge_log.updates[1]) is not None
    assert set(after.merge_log.updates[2]) == set(SHAPES)


def test_what_decides_over_all_modules_is_found_out():
    method = dataclasses.replace(made("hetlora"), keep=0.5)
    clients = clients_of(method)
    state = played(method, clients, 1)
    cohort, context = cohort_in(method, state, clients, 2)
    assert Feature.PER_MODULE not in method.features
    parts = []
    for number, module in enumerate(SHAPES):
        part = partial_step.aggregate(method, state, cohort, context, [module])
        changed = dataclasses.replace(part.state, per_client={"total": {"c0": number}})
        parts.append(dataclasses.replace(part, state=changed))
    with pytest.raises(ValueError, match=r"changed State\.per_client.*PER_MODULE"):
        partial_step.joined(state, parts, context)


def test_a_value_by_module_is_each_parts_own():
    """Nothing stays of what was said of a module before."""
    context, _ = context_of_sizes(2)
    state = state_of(context)
    first, second = context.shapes
    before = {first: {"route": "dense", "refused": 0.4}, second: {"route": "qr"}}
    state = dataclasses.replace(state, per_module={"decomposition": before})
    now = {m: {"route": "krylov"} for m in (first, second)}
    parts = [
        partial_step.Part(
            [m],
            dataclasses.replace(state.only([m]), per_module={"decomposition": {m: now[m]}}),
            frozenset({""}),
        )
        for m in now
    ]
    joined = partial_step.joined(state, parts, context)
    assert joined.per_module == {"decomposition": now}
    assert list(joined.per_module["decomposition"]) == list(context.shapes)


def test_what_parts_change_of_the_merge_log_is_put_together():
    context, _ = context_of_sizes(2)
    before = MergeLog({}, {"a": 1, "b": 1, "c": 1})
    state = dataclasses.replace(state_of(context), merge_log=before)
    changed = ({"a": 2, "b": 1, "c": 1}, {"a": 1, "b": 3, "c": 1})
    parts = [
        partial_step.Part(
            [m],
            dataclasses.replace(state.only([m]), merge_log=MergeLog({}, merged_until)),
            frozenset({""}),
        )
        for m, merged_until in zip(context.shapes, changed, strict=True)
    ]
    after = partial_step.joined(state, parts, context)
    assert after.merge_log.merged_until == {"a": 2, "b": 3, "c": 1}
    assert after.model is state.model


def context_of_sizes(count):
    """Modules of three sizes, each size's in a row."""
    sizes = {f"layer.{n}": 5 + 40 * (3 * n // count) for n in range(count)}
    shapes = {module: (size, size) for module, size in sizes.items()}
    return RoundContext(1, 5, shapes, dict.fromkeys(sizes, 8)), sizes


def state_of(context):
    shapes = context.shapes.items()
    return State(
        Adapter({m: Factors(torch.zeros(o, 2), torch.zeros(2, i)) for m, (o, i) in shapes})
    )


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("count", [42, 100])
def test_modules_are_split_evenly_the_costly_parts_first(count, threads):
    context, sizes = context_of_sizes(count)
    parts = partial_step.split(context, 2, threads)
    assert sorted(m for part in parts for m in part) == sorted(sizes)
    assert 2 <= len(parts) <= 2 * partial_step.PARTS_PER_PROCESS
    assert min(map(len, parts)) >= partial_step.MODULES_PER_THREAD * threads
    costs = [sum(sizes[m] for m in part) for part in parts]
    assert costs == sorted(costs, reverse=True) and costs[0] - costs[-1] <= 2 * max(sizes.values())


def test_too_little_is_not_split():
    context, sizes = context_of_sizes(42)
    for processes, threads in ((1, 1), (2, 8)):
        assert partial_step.split(context, processes, threads) == [list(sizes)]
    few = context_of(1, clients_of(made("flexlora")))
    assert partial_step.split(few, 2, 1) == [list(SHAPES)]
