"""Server optimisers against dense float64 recursions, and what they compose with."""

import dataclasses
import math

import pytest
import torch

from flexlora import methods, wire
from flexlora.errors import ConfigError
from flexlora.federation import checkpoint, rounds, setup
from flexlora.laws.dense import best, product, relative_error
from flexlora.laws.rounds import (
    EXAMPLES,
    SHAPES,
    after_rounds,
    aggregated,
    client_turn,
    clients_of,
    context_of,
    first_state,
    no_training,
    noise,
)
from flexlora.lowrank.factors import Adapter
from flexlora.method import server_optimizers
from flexlora.method.interface import Feature, Method
from flexlora.method.server_optimizer import (
    MOMENTS,
    MOMENTUM,
    WithServerOptimizer,
    with_server_optimizer,
)
from flexlora.method.server_optimizers.fedadam import FedAdam
from flexlora.method.server_optimizers.fedavgm import FedAvgM
from flexlora.method.wrapper import MethodWrapper
from support import models
from support.states import adapters_of

PRODUCTS = [
    name for name in methods.names() if Feature.PRODUCT_STATE in methods.make(name, {}).features
]
FULL = [{"model.q": 7, "model.up": 5}] * 3
"""Ranks at which nothing is truncated."""


def made(name, **options):
    return methods.make(name, options)


def played(method, clients, rounds, learn_of=None, state=None):
    learn_in = learn_of or (lambda number: noise(method, number))
    return after_rounds(method, clients, rounds, learn_in, state)


def turns_of(method, state, clients, number):
    """The round of every client, and the context."""
    context, learn = context_of(number, clients), noise(method, number)
    return [client_turn(method, state, c, context, learn) for c in clients], context


def after(method, state, turns, context):
    return aggregated(method, state, [turn.upload for turn in turns], context)


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
        got, want = (played(m, clients, count) for m in (optimized, method))
        assert_same(got.model, want.model)
        assert got.model.ranks == want.model.ranks
        losses = got.per_module["lost_energy"].values()
        assert all(abs(loss) < 1e-12 for loss in losses)


@pytest.mark.parametrize("split", ["left", "balanced"])
def test_factors_are_split_as_the_method_splits_them(split):
    method = made("flexlora", split=split)
    clients = clients_of(method)
    state = played(WithServerOptimizer(method, FedAvgM()), clients, 2)
    for f in state.model.values():
        rows = f.A.norm(dim=1)
        even = torch.allclose(rows, torch.ones_like(rows))
        assert even == (split == "left")


@pytest.mark.parametrize(("momentum", "rate"), [(0.9, 1.0), (0.5, 0.3), (0.0, 2.0)])
@pytest.mark.parametrize("name", PRODUCTS)
def test_fedavgm_is_the_dense_recursion(name, momentum, rate):
    """M = beta M + (aggregate - W), W = W + rate M, where no rank is cut."""
    method = WithServerOptimizer(made(name), FedAvgM(momentum, rate))
    clients = clients_of(method, FULL)
    state = first_state(method, clients)
    W = {m: torch.zeros(s, dtype=torch.float64) for m, s in SHAPES.items()}
    M = {m: torch.zeros_like(w) for m, w in W.items()}
    for number in (1, 2, 3, 4):
        turns, context = turns_of(method, state, clients, number)
        for m in SHAPES:
            M[m] = momentum * M[m] + mean(turns, m) - W[m]
            W[m] = W[m] + rate * M[m]
        state = after(method, state, turns, context)
        for m in SHAPES:
            assert relative_error(product(state.model[m]), W[m]) < 1e-9
            assert relative_error(product(state.memory[MOMENTUM][m]), M[m]) < 1e-9


def test_fedadam_is_the_dense_recursion_with_a_moment_for_each_module():
    method = WithServerOptimizer(made("flexlora"), FedAdam(rate=0.02, betas=(0.8, 0.7), tau=0.1))
    clients = clients_of(method, FULL)
    state = first_state(method, clients)
    W = {m: torch.zeros(s, dtype=torch.float64) for m, s in SHAPES.items()}
    M, v = {m: torch.zeros_like(w) for m, w in W.items()}, dict.fromkeys(SHAPES, 0.1**2)
    for number in (1, 2, 3):
        turns, context = turns_of(method, state, clients, number)
        for m in SHAPES:
            D = mean(turns, m) - W[m]
            M[m] = 0.8 * M[m] + 0.2 * D
            v[m] = 0.7 * v[m] + 0.3 * float(D.square().mean())
            W[m] = W[m] + 0.02 * M[m] / (math.sqrt(v[m]) + 0.1)
        state = after(method, state, turns, context)
        for m in SHAPES:
            assert relative_error(product(state.model[m]), W[m]) < 1e-9
            assert state.per_module[MOMENTS][m] == pytest.approx(v[m], rel=1e-12)


def test_a_first_step_of_fedadam_has_entries_of_its_rate():
    """The mean square of what it adds is the rate's square, whatever the change's size."""
    for size in (0.01, 1.0, 100.0):
        method = WithServerOptimizer(
            made("flexlora"), FedAdam(rate=0.02, betas=(0.9, 0.99), tau=1e-9)
        )
        clients = clients_of(method, FULL)
        state = played(
            method, clients, 1, lambda n, size=size, method=method: noise(method, n, size=size)
        )
        for f in state.model.values():
            assert product(f).square().mean().sqrt().item() == pytest.approx(0.02, rel=1e-3)


def test_what_truncation_loses_is_said():
    """The energy of the model and of the momentum beyond the ranks that the server keeps."""
    method = WithServerOptimizer(made("flexlora"), FedAvgM(0.9, 0.7))
    clients = clients_of(method)
    before = played(method, clients, 2)
    turns, context = turns_of(method, before, clients, 3)
    state = after(method, before, turns, context)
    for m, rank in context.ranks.items():
        last, old = product(before.model[m]), product(before.memory[MOMENTUM][m])
        aggregate = best(mean(turns, m), rank)
        M = 0.9 * old + aggregate - last
        W = last + 0.7 * M
        for dense, adapter, name in (
            (W, state.model, "lost_energy"),
            (M, state.memory[MOMENTUM], "momentum_lost_energy"),
        ):
            kept = best(dense, rank)
            assert relative_error(product(adapter[m]), kept) < 1e-9
            lost = ((dense - kept).norm() / dense.norm()).square()
            assert state.per_module[name][m] == pytest.approx(float(lost), abs=1e-12)
            assert state.per_module[name][m] > 1e-4
        assert set(state.per_module["aggregate_lost_energy"]) == set(SHAPES)


@pytest.mark.parametrize("optimizer", [FedAvgM(), FedAdam()])
def test_order_of_clients_is_irrelevant(optimizer):
    method = WithServerOptimizer(made("raflora"), optimizer)
    clients = clients_of(method)
    state = played(method, clients, 2)
    turns, context = turns_of(method, state, clients, 3)
    got, want = (after(method, state, each, context) for each in (turns[::-1], turns))
    for name in ("model", MOMENTUM):
        assert_same(adapters_of(got)[name], adapters_of(want)[name])


def test_momentum_goes_on_when_nobody_learns_anything():
    """Fold and method hand back the model itself, so that D is zero, and M shrinks by beta."""
    method = WithServerOptimizer(made("flexfold"), FedAvgM(0.5, 1.0))
    clients = clients_of(method)
    state = played(method, clients, 1)
    later = played(method, clients, 1, lambda number: no_training, state)
    for m, rank in context_of(1, clients).ranks.items():
        W, M = product(state.model[m]), product(state.memory[MOMENTUM][m])
        assert relative_error(product(later.memory[MOMENTUM][m]), 0.5 * M) < 1e-9
        want = best(W + 0.5 * M, rank)
        assert relative_error(product(later.model[m]), want) < 1e-9


@pytest.mark.parametrize("optimizer", [FedAvgM(), FedAdam()])
def test_state_survives_save_and_load(optimizer, tmp_path):
    method = WithServerOptimizer(made("flexlora"), optimizer)
    clients = clients_of(method)
    state = played(method, clients, 2)
    state = dataclasses.replace(
        state,
        model=state.model.to(torch.float32),
        memory={k: a.to(torch.float32) for k, a in state.memory.items()},
    )
    loaded = checkpoint.save(tmp_path, 2, 0, state).state
    assert loaded.per_module == state.per_module and loaded.per_client == state.per_client
    turns, context = turns_of(method, state, clients, 3)
    got, want = (after(method, s, turns, context) for s in (loaded, state))
    for name in ("model", MOMENTUM):
        for m in SHAPES:
            assert torch.equal(adapters_of(got)[name][m].B, adapters_of(want)[name][m].B)
            assert torch.equal(adapters_of(got)[name][m].A, adapters_of(want)[name][m].A)


def test_inputs_are_not_changed():
    method = WithServerOptimizer(made("flexlora"), FedAvgM())
    clients = clients_of(method)
    state = played(method, clients, 2)
    turns, context = turns_of(method, state, clients, 3)
    inputs = [*adapters_of(state).values(), *(turn.upload.adapter for turn in turns)]
    before = [x.clone() for a in inputs for f in a.values() for x in (f.B, f.A)]
    after(method, state, turns, context)
    now = [x for a in inputs for f in a.values() for x in (f.B, f.A)]
    assert all(torch.equal(x, y) for x, y in zip(before, now, strict=True))


# --- what composes -------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in methods.names() if n not in PRODUCTS])
def test_other_methods_are_refused_by_name_and_reason(name):
    method = made(name)
    with pytest.raises(ConfigError, match="does not support a model that is a product") as caught:
        with_server_optimizer(method, FedAvgM())
    assert method.title in str(caught.value) and FedAvgM.title in str(caught.value)


def test_a_model_that_its_method_cuts_by_energy_is_refused():
    with pytest.raises(ConfigError, match=r"FlexFold.*leave out .* any energy below 1"):
        with_server_optimizer(made("flexfold", energy=0.9), FedAvgM())


@dataclasses.dataclass(frozen=True)
class Unchanged(MethodWrapper):
    inner: Method

    @property
    def wrapped(self):
        return self.inner

    @property
    def label(self):
        return ""


def test_every_decision_is_handed_on_and_everything_declared_is_the_methods():
    """So that one that is added to Method cannot be forgotten."""
    decisions = {n for n, v in vars(Method).items() if n[0] != "_" and callable(v)}
    properties = {n for n, v in vars(Method).items() if isinstance(v, property)}
    assert "penalty" in decisions and "features" in properties
    # The title is the one of ``info``.
    assert decisions | (properties - {"title"}) <= vars(MethodWrapper).keys()
    for name in methods.names():
        inner = made(name)
        outer = Unchanged(inner)
        for declared in properties:
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
        ({}, r"server_optimizer\.name' is missing; it is one of fedadam, fedavgm"),
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
    with pytest.raises(ValueError, match=r"HetLoRA.* does not support a model that is a product"):
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
    assert set(adapters_of(states[0])) == {"model", MOMENTUM}
    for name in ("model", MOMENTUM):
        one, other = (Adapter(dict(adapters_of(state)[name])) for state in states)
        assert all(torch.equal(one[m].B, other[m].B) for m in one)
        assert all(torch.equal(one[m].A, other[m].A) for m in one)
        assert any(product(f).norm() > 0 for f in one.values())
