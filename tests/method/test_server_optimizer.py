"""Server optimisers against dense float64 recursions, and what they compose with."""

import dataclasses
import math

import pytest
import torch
from support.oracle import best, product, relative_error
from support.rounds import EXAMPLES, SHAPES, clients_of, jolt, made, played, started, still, turn

from flexlora import methods, wire
from flexlora.errors import ConfigError
from flexlora.federation import checkpoint, rounds, setup
from flexlora.lowrank.factors import Adapter
from flexlora.method import server_optimizers
from flexlora.method.interface import Method
from flexlora.method.server_optimizer import MOMENTS, MOMENTUM, WithServerOptimizer
from flexlora.method.server_optimizers.fedadam import FedAdam
from flexlora.method.server_optimizers.fedavgm import FedAvgM
from flexlora.method.wrapper import MethodWrapper
from support import models

PRODUCTS = [name for name in methods.names() if methods.kind(name).product]
FULL = [{"model.q": 7, "model.up": 5}] * 3
"""Ranks at which nothing is truncated."""


def mean(turns, module):
    weights = [n / sum(EXAMPLES) for n in EXAMPLES]
    return sum(w * product(t.trained[module]) for w, t in zip(weights, turns, strict=True))


def assert_same(got, want, tolerance=1e-9):
    for module in SHAPES:
        assert relative_error(product(got[module]), product(want[module])) < tolerance


def test_methods_whose_state_is_a_product_say_so():
    assert PRODUCTS == ["flexfold", "flexlora", "raflora"]


@pytest.mark.parametrize("name", PRODUCTS)
def test_fedavgm_without_momentum_at_a_whole_step_is_the_method(name):
    """In every round, also where clients of mixed ranks were handed what it made."""
    method = made(name)
    clients = clients_of(method)
    optimized = WithServerOptimizer(method, FedAvgM(momentum=0.0, rate=1.0))
    for count in (1, 2, 4):
        got, want = (played(m, clients, count, jolt) for m in (optimized, method))
        assert_same(got.adapters["global"], want.adapters["global"])
        assert got.adapters["global"].ranks == want.adapters["global"].ranks
        losses = got.facts["step_lost_energy"].values()
        assert all(abs(loss) < 1e-12 for loss in losses)


@pytest.mark.parametrize("split", ["left", "balanced"])
def test_factors_are_split_as_the_method_splits_them(split):
    method = made("flexlora", split=split)
    clients = clients_of(method)
    state = played(WithServerOptimizer(method, FedAvgM()), clients, 2, jolt)
    for f in state.adapters["global"].values():
        rows = f.A.norm(dim=1)
        even = torch.allclose(rows, torch.ones_like(rows))
        assert even == (split == "left")


@pytest.mark.parametrize(("momentum", "rate"), [(0.9, 1.0), (0.5, 0.3), (0.0, 2.0)])
@pytest.mark.parametrize("name", PRODUCTS)
def test_fedavgm_is_the_dense_recursion(name, momentum, rate):
    """M = beta M + (aggregate - W), W = W + rate M, where no rank is cut."""
    method = WithServerOptimizer(made(name), FedAvgM(momentum, rate))
    clients = clients_of(method, FULL)
    state = started(method, clients)
    W = {m: torch.zeros(s, dtype=torch.float64) for m, s in SHAPES.items()}
    M = {m: torch.zeros_like(w) for m, w in W.items()}
    for number in (1, 2, 3, 4):
        turns = [turn(method, state, c, number, jolt(number)) for c in clients]
        for m in SHAPES:
            M[m] = momentum * M[m] + mean(turns, m) - W[m]
            W[m] = W[m] + rate * M[m]
        state = method.aggregate(state, [t.upload for t in turns])
        for m in SHAPES:
            assert relative_error(product(state.adapters["global"][m]), W[m]) < 1e-9
            assert relative_error(product(state.adapters[MOMENTUM][m]), M[m]) < 1e-9


def test_fedadam_is_the_dense_recursion_with_a_moment_for_each_module():
    method = WithServerOptimizer(made("flexlora"), FedAdam(rate=0.02, betas=(0.8, 0.7), tau=0.1))
    clients = clients_of(method, FULL)
    state = started(method, clients)
    W = {m: torch.zeros(s, dtype=torch.float64) for m, s in SHAPES.items()}
    M, v = {m: torch.zeros_like(w) for m, w in W.items()}, dict.fromkeys(SHAPES, 0.1**2)
    for number in (1, 2, 3):
        turns = [turn(method, state, c, number, jolt(number)) for c in clients]
        for m in SHAPES:
            D = mean(turns, m) - W[m]
            M[m] = 0.8 * M[m] + 0.2 * D
            v[m] = 0.7 * v[m] + 0.3 * float(D.square().mean())
            W[m] = W[m] + 0.02 * M[m] / (math.sqrt(v[m]) + 0.1)
        state = method.aggregate(state, [t.upload for t in turns])
        for m in SHAPES:
            assert relative_error(product(state.adapters["global"][m]), W[m]) < 1e-9
            assert state.facts[MOMENTS][m] == pytest.approx(v[m], rel=1e-12)


def test_a_first_step_of_fedadam_has_entries_of_its_rate():
    """The mean square of what it adds is the rate's square, whatever the change's size."""
    for size in (0.01, 1.0, 100.0):
        method = WithServerOptimizer(
            made("flexlora"), FedAdam(rate=0.02, betas=(0.9, 0.99), tau=1e-9)
        )
        clients = clients_of(method, FULL)
        state = played(method, clients, 1, lambda n, size=size: jolt(n, size=size))
        for f in state.adapters["global"].values():
            assert product(f).square().mean().sqrt().item() == pytest.approx(0.02, rel=1e-3)


def test_what_truncation_loses_is_said():
    """The energy of the model and of the momentum beyond the ranks that the server keeps."""
    method = WithServerOptimizer(made("flexlora"), FedAvgM(0.9, 0.7))
    clients = clients_of(method)
    before = played(method, clients, 2, jolt)
    turns = [turn(method, before, c, 3, jolt(3)) for c in clients]
    after = method.aggregate(before, [t.upload for t in turns])
    for m, rank in before.facts["ranks"].items():
        last, old = product(before.adapters["global"][m]), product(before.adapters[MOMENTUM][m])
        aggregate = best(mean(turns, m), rank)
        M = 0.9 * old + aggregate - last
        W = last + 0.7 * M
        for dense, name, fact in (
            (W, "global", "step_lost_energy"),
            (M, MOMENTUM, "momentum_lost_energy"),
        ):
            kept = best(dense, rank)
            assert relative_error(product(after.adapters[name][m]), kept) < 1e-9
            lost = ((dense - kept).norm() / dense.norm()).square()
            assert after.facts[fact][m] == pytest.approx(float(lost), abs=1e-12)
            assert after.facts[fact][m] > 1e-4
        assert set(after.facts["lost_energy"]) == set(SHAPES)


@pytest.mark.parametrize("optimizer", [FedAvgM(), FedAdam()])
def test_order_of_clients_is_irrelevant(optimizer):
    method = WithServerOptimizer(made("raflora"), optimizer)
    clients = clients_of(method)
    state = played(method, clients, 2, jolt)
    uploads = [turn(method, state, c, 3, jolt(3)).upload for c in clients]
    got, want = (method.aggregate(state, found) for found in (uploads[::-1], uploads))
    for name in ("global", MOMENTUM):
        assert_same(got.adapters[name], want.adapters[name])


def test_momentum_goes_on_when_nobody_learns_anything():
    """Fold and method hand back the model itself, so that D is zero, and M shrinks by beta."""
    method = WithServerOptimizer(made("flexfold"), FedAvgM(0.5, 1.0))
    clients = clients_of(method)
    state = played(method, clients, 1, jolt)
    after = played(method, clients, 1, lambda number: still, state)
    for m in SHAPES:
        W, M = product(state.adapters["global"][m]), product(state.adapters[MOMENTUM][m])
        assert relative_error(product(after.adapters[MOMENTUM][m]), 0.5 * M) < 1e-9
        want = best(W + 0.5 * M, state.facts["ranks"][m])
        assert relative_error(product(after.adapters["global"][m]), want) < 1e-9


@pytest.mark.parametrize("optimizer", [FedAvgM(), FedAdam()])
def test_state_survives_save_and_load(optimizer, tmp_path):
    method = WithServerOptimizer(made("flexlora"), optimizer)
    clients = clients_of(method)
    state = played(method, clients, 2, jolt)
    state = dataclasses.replace(
        state, adapters={k: a.to(torch.float32) for k, a in state.adapters.items()}
    )
    loaded = checkpoint.save(tmp_path, 2, 0, state).state
    assert loaded.facts == state.facts
    uploads = [turn(method, state, c, 3, jolt(3)).upload for c in clients]
    got, want = (method.aggregate(s, uploads) for s in (loaded, state))
    for name in ("global", MOMENTUM):
        for m in SHAPES:
            assert torch.equal(got.adapters[name][m].B, want.adapters[name][m].B)
            assert torch.equal(got.adapters[name][m].A, want.adapters[name][m].A)


def test_inputs_are_not_changed():
    method = WithServerOptimizer(made("flexlora"), FedAvgM())
    clients = clients_of(method)
    state = played(method, clients, 2, jolt)
    uploads = [turn(method, state, c, 3, jolt(3)).upload for c in clients]
    held = [*state.adapters.values(), *(u.adapter for u in uploads)]
    before = [x.clone() for a in held for f in a.values() for x in (f.B, f.A)]
    method.aggregate(state, uploads)
    after = [x for a in held for f in a.values() for x in (f.B, f.A)]
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


# --- what composes -------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in methods.names() if n not in PRODUCTS])
def test_other_methods_are_refused_by_name_and_reason(name):
    method = made(name)
    with pytest.raises(ValueError, match="is not a product alone") as caught:
        WithServerOptimizer(method, FedAvgM())
    assert method.title in str(caught.value) and FedAvgM.title in str(caught.value)


def test_a_model_that_its_method_cuts_by_energy_is_refused():
    with pytest.raises(ValueError, match=r"at an energy of 0\.9, .* set method\.energy = 1"):
        WithServerOptimizer(made("flexfold", energy=0.9), FedAvgM())


def test_every_decision_is_handed_on_and_everything_declared_is_the_methods():
    """So that one that is added to Method cannot be forgotten."""
    decisions = {n for n, v in vars(Method).items() if n[0] != "_" and callable(v)}
    properties = {n for n, v in vars(Method).items() if isinstance(v, property)}
    assert "penalty" in decisions and "by_rank_alone" in properties
    assert decisions | properties <= vars(MethodWrapper).keys()
    for name in methods.names():
        inner = made(name)
        outer = MethodWrapper(inner)
        assert outer.by_rank_alone == inner.by_rank_alone
        for declared in Method.__annotations__:
            assert getattr(outer, declared) == getattr(inner, declared)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (FedAvgM, {"momentum": 1.0}, r"momentum lies in \[0, 1\), got 1.0"),
        (FedAvgM, {"rate": 0.0}, "rate is finite and above 0, got 0.0"),
        (FedAdam, {"tau": 0.0}, "tau is finite and above 0"),
        (FedAdam, {"rate": math.inf}, "rate is finite and above 0"),
        (FedAdam, {"betas": (0.9, 1.0)}, r"betas lie in \[0, 1\)"),
    ],
)
def test_impossible_options_are_refused(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(**options)


def test_a_kind_is_a_file_that_says_its_paper():
    assert server_optimizers.names() == ["fedadam", "fedavgm"]
    for name in server_optimizers.names():
        found = server_optimizers.make({"name": name})
        assert type(found).__name__.lower() == name
        assert found.title and found.paper.startswith("arXiv ")


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({}, "'name' is missing; it is one of fedadam, fedavgm"),
        ({"name": "fedavg"}, "no server optimizer 'fedavg'. Did you mean 'fedavgm'"),
        ({"name": "fedavgm", "momentun": 0.5}, "no option 'momentun'. Did you mean 'momentum'"),
        ({"name": "fedavgm", "momentum": "big"}, "option 'momentum' is 'big'"),
        ({"name": "fedavgm", "momentum": 1.5}, r"momentum lies in \[0, 1\)"),
    ],
)
def test_a_section_is_checked_before_anything_runs(folder, section, message):
    with pytest.raises(ConfigError, match=message):
        models.settings(folder, method={"name": "flexlora"}, server_optimizer=section)


def test_what_does_not_compose_is_refused_at_start_up(folder):
    how = models.settings(folder, method={"name": "hetlora"}, server_optimizer={"name": "fedavgm"})
    with pytest.raises(ValueError, match=r"HetLoRA.* is not a product alone"):
        setup.prepare(how, models.corpus())


def test_a_run_has_momentum_and_goes_on_with_it(folder, tmp_path, monkeypatch):
    """Rounds, checkpoint and resumption; downloads are still made once for equal ranks."""
    how = {
        "method": {"name": "flexlora"},
        "server_optimizer": {"name": "fedavgm", "momentum": 0.5},
        "evaluation": {"seen_clients": 0},
    }
    made_ = []
    encode = wire.encode_download
    monkeypatch.setattr(wire, "encode_download", lambda *a: made_.append(1) or encode(*a))
    whole = setup.prepare(models.settings(folder, **how), models.corpus())
    assert isinstance(whole.method, WithServerOptimizer)
    events = list(rounds.run(whole, tmp_path / "whole"))
    asked = [event["rank_type"] for event in events if event["event"] == "client"]
    assert len(made_) < len(asked)
    short = setup.prepare(models.settings(folder, **how, federation={"rounds": 2}), models.corpus())
    list(rounds.run(short, tmp_path / "resumed"))
    list(rounds.run(whole, tmp_path / "resumed", resume=True))
    states = [checkpoint.load(tmp_path / name).state for name in ("whole", "resumed")]
    assert set(states[0].adapters) == {"global", MOMENTUM}
    for name in ("global", MOMENTUM):
        one, other = (Adapter(dict(state.adapters[name])) for state in states)
        assert all(torch.equal(one[m].B, other[m].B) for m in one)
        assert all(torch.equal(one[m].A, other[m].A) for m in one)
        assert any(product(f).norm() > 0 for f in one.values())
