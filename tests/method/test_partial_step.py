"""A server step in parts; that every method's is the whole one is a law (methods/test_laws.py)."""

import dataclasses

import pytest
import torch

from flexlora import wire
from flexlora.federation import checkpoint
from flexlora.lowrank.factors import Adapter, Factors
from flexlora.method import partial_step
from flexlora.method.interface import State
from flexlora.method.regularizers.fedprox import FedProx
from flexlora.method.regularizers.scaffold import Scaffold
from flexlora.method.server_optimizer import WithServerOptimizer
from flexlora.method.server_optimizers.fedadam import FedAdam
from flexlora.method.server_optimizers.fedavgm import FedAvgM
from flexlora.training.optimizer import Training
from support.rounds import SHAPES, clients_of, jolt, made, played, started, turn

SGD = Training(optimizer="sgd", weight_decay=0.0)


def numbers(state):
    return [x for a in state.adapters.values() for f in a.values() for x in (f.B, f.A)]


@pytest.mark.parametrize(
    "method",
    [
        WithServerOptimizer(made("flexlora"), FedAdam()),
        WithServerOptimizer(made("raflora"), FedAvgM()),
        FedProx().around(made("flexfold"), SGD),
    ],
    ids=lambda method: method.title,
)
def test_a_method_within_another_goes_by_module_too(method):
    clients = clients_of(method)
    state = played(method, clients, 2, jolt)
    uploads = [turn(method, state, c, 3, jolt(3)).upload for c in clients]
    want = method.aggregate(state, uploads)
    assert method.by_module
    found = [partial_step.aggregated(method, state, uploads, [module]) for module in SHAPES]
    got = partial_step.joined(state, found)
    assert got.facts == want.facts and list(got.adapters) == list(want.adapters)
    assert all(torch.equal(x, y) for x, y in zip(numbers(got), numbers(want), strict=True))


def test_controls_beside_the_factors_are_not_of_modules():
    assert not Scaffold().around(made("fedit"), SGD).by_module


def test_a_log_of_merged_updates_stays_on_the_disk(tmp_path):
    method = made("flora")
    clients = clients_of(method)
    state = checkpoint.save(tmp_path, 1, 0, played(method, clients, 1, jolt)).state
    uploads = [turn(method, state, c, 2, jolt(2)).upload for c in clients]
    found = [partial_step.aggregated(method, state, uploads, [module]) for module in SHAPES]
    after = partial_step.joined(state, found)
    assert wire.stored_at(after.adapters["merged-00001"]) is not None
    assert set(after.adapters["merged-00002"]) == set(SHAPES)


def test_what_decides_over_all_modules_is_found_out():
    method = dataclasses.replace(made("hetlora"), keep=0.5)
    clients = clients_of(method)
    state = played(method, clients, 1, jolt)
    uploads = [turn(method, state, c, 2, jolt(2)).upload for c in clients]
    assert not method.by_module
    found = [
        dataclasses.replace(
            partial_step.aggregated(method, state, uploads, [m]), facts={"total": n}
        )
        for n, m in enumerate(SHAPES)
    ]
    with pytest.raises(ValueError, match=r"fact 'total'.*by_module"):
        partial_step.joined(state, found)


def test_a_fact_of_modules_is_each_parts_own():
    """Nothing stays of what was said of a module before."""
    state, _ = state_of(2)
    first, second = state.adapters["global"]
    before = {first: {"route": "dense", "refused": 0.4}, second: {"route": "qr"}}
    state = State(state.adapters, {"decomposition": before})
    now = {m: {"route": "krylov"} for m in (first, second)}
    found = [partial_step.Part([m], {"global": None}, {"decomposition": {m: now[m]}}) for m in now]
    assert partial_step.joined(state, found).facts == {"decomposition": now}


def test_what_parts_change_of_one_table_is_put_together():
    state, _ = state_of(2)
    state = State(state.adapters, {"merged": {"a": 1, "b": 1, "c": 1}, "rounds": 4})
    facts = (
        {"merged": {"a": 2, "b": 1, "c": 1}, "rounds": 5},
        {"merged": {"a": 1, "b": 3, "c": 1}},
    )
    found = [
        partial_step.Part([m], {"global": None}, {"rounds": 4, **said})
        for m, said in zip(state.adapters["global"], facts, strict=True)
    ]
    after = partial_step.joined(state, found)
    assert after.facts == {"merged": {"a": 2, "b": 3, "c": 1}, "rounds": 5}
    assert after.adapters["global"] is state.adapters["global"]


def state_of(count):
    """Modules of three sizes, each size's in a row."""
    sizes = {f"layer.{n}": 5 + 40 * (3 * n // count) for n in range(count)}
    modules = {m: Factors(torch.zeros(s, 2), torch.zeros(2, s)) for m, s in sizes.items()}
    return State({"global": Adapter(modules)}, {"ranks": dict.fromkeys(modules, 8)}), sizes


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("count", [42, 100])
def test_modules_are_dealt_evenly_the_costly_parts_first(count, threads):
    state, sizes = state_of(count)
    found = partial_step.dealt(state, 2, threads)
    assert sorted(m for part in found for m in part) == sorted(sizes)
    assert 2 <= len(found) <= 2 * partial_step.PARTS_A_PROCESS
    assert min(map(len, found)) >= partial_step.MODULES_A_THREAD * threads
    costs = [sum(sizes[m] for m in part) for part in found]
    assert costs == sorted(costs, reverse=True) and costs[0] - costs[-1] <= 2 * max(sizes.values())


def test_too_little_is_not_dealt():
    state, sizes = state_of(42)
    for processes, threads in ((1, 1), (2, 8)):
        assert partial_step.dealt(state, processes, threads) == [list(sizes)]
    few = started(made("flexlora"), clients_of(made("flexlora")))
    assert partial_step.dealt(few, 2, 1) == [list(SHAPES)]
