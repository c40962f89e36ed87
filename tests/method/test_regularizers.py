"""Regularisers: FedProx against dense autograd, SCAFFOLD against the paper's own claims."""

import dataclasses
import math

import pytest
import torch

from flexlora import methods, wire
from flexlora.errors import ConfigError
from flexlora.federation import checkpoint, rounds, setup
from flexlora.federation import client_turn as turns
from flexlora.federation.client_store import ClientStore
from flexlora.federation.client_turn import TurnRequest
from flexlora.laws.dense import product, relative_error
from flexlora.laws.rounds import (
    SHAPES,
    after_rounds,
    aggregated,
    client_turn,
    clients_of,
    context_of,
    first_state,
    noise,
    opened,
)
from flexlora.lowrank.factors import Adapter, Factors
from flexlora.method import regularizers
from flexlora.method.interface import Download, Feature, Turn, Upload
from flexlora.method.regularizers.fedprox import FedProx, WithFedProx, squared_distance
from flexlora.method.regularizers.scaffold import CONTROL, HEARD, OWN, Scaffold, WithScaffold
from flexlora.method.server_optimizer import WithServerOptimizer
from flexlora.training.optimizer import Training
from flexlora.wire import validate
from support import models
from support.factors import random_factors
from support.states import adapters_of

SGD = Training(optimizer="sgd", schedule="constant", learning_rate=0.1, clip_norm=1e9, alpha=4.0)


def made(name, **options):
    return methods.make(name, options)


def played(method, clients, rounds):
    return after_rounds(method, clients, rounds, lambda number: noise(method, number))


def leaves(f: Factors) -> Factors:
    return Factors(f.B.clone().requires_grad_(), f.A.clone().requires_grad_())


# --- FedProx -------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 3, 7, 12])
def test_the_distance_and_its_gradient_are_the_dense_ones(rank):
    """Also where the rank is larger than the matrix."""
    start, now = random_factors(11, rank, 7, 1), random_factors(11, rank, 7, 2)
    found = []
    for formula in (
        lambda f: squared_distance(f, start),
        lambda f: (f.B @ f.A - start.B @ start.A).square().sum(),
    ):
        f = leaves(now)
        value = formula(f)
        found.append([value.detach(), *torch.autograd.grad(value, [f.B, f.A])])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-9)


def test_the_penalty_is_half_the_strength_times_the_sum_over_the_modules():
    start = Adapter({m: random_factors(*s[:1], 3, s[1], 1) for m, s in SHAPES.items()})
    now = {m: random_factors(*s[:1], 3, s[1], 2) for m, s in SHAPES.items()}
    method = FedProx(strength=0.3).wrap(made("flexlora"), SGD)
    want = 0.15 * sum((product(now[m]) - product(start[m])).square().sum() for m in SHAPES)
    torch.testing.assert_close(method.penalty(now, Download(start)), want)


def test_it_does_not_matter_how_products_are_split():
    """(B R, R^-1 A) is as far from the start as (B, A)."""
    start, now = random_factors(11, 5, 7, 1), random_factors(11, 5, 7, 2)
    R = random_factors(5, 5, 5, 3).B
    other = Factors(now.B @ R, torch.linalg.inv(R) @ now.A)
    torch.testing.assert_close(squared_distance(other, start), squared_distance(now, start))
    same = Factors(start.B @ R, torch.linalg.inv(R) @ start.A)
    scale = product(start).square().sum()
    assert abs(float(squared_distance(same, start))) < 1e-12 * float(scale)


def test_no_digits_are_lost_near_the_start():
    """In float32, a millionth of the way: where a difference of squares would be noise."""
    start = random_factors(110, 5, 70, 1, torch.float32)
    step = random_factors(110, 5, 70, 2, torch.float32)
    now = Factors(start.B + 1e-5 * step.B, start.A + 1e-5 * step.A)
    want = (product(now) - product(start)).square().sum()
    f = leaves(now)
    value = squared_distance(f, start)
    assert value.item() == pytest.approx(float(want), rel=1e-4)
    gradient = torch.autograd.grad(value, f.B)[0]
    dense = 2 * (product(now) - product(start)) @ now.A.double().T
    assert relative_error(gradient, dense) < 1e-4
    at_start = leaves(start)
    zero = torch.autograd.grad(squared_distance(at_start, start), [at_start.B, at_start.A])
    assert not any(gradient.any() for gradient in zero)


def test_it_is_added_to_the_methods_own_penalty():
    start = Download(Adapter({m: random_factors(s[0], 6, s[1], 1) for m, s in SHAPES.items()}))
    now = {m: random_factors(s[0], 6, s[1], 2) for m, s in SHAPES.items()}
    hetlora = made("hetlora", keep=0.5, decay=0.2)
    prox = FedProx(0.3)
    both, alone = prox.wrap(hetlora, SGD), prox.wrap(made("flexlora"), SGD)
    want = hetlora.penalty(now, start) + alone.penalty(now, start)
    torch.testing.assert_close(both.penalty(now, start), want)


def ready_for(folder, name, same=False, **changes):
    if same or Feature.MIXED_RANKS not in methods.make(name, {}).features:
        same = {"all": {"attention": 3, "feed_forward": 3}}
        changes["ranks"] = {"types": same, "distribution": {"all": 1.0}}
    how = models.settings(folder, method={"name": name}, **changes)
    return setup.prepare(how, models.corpus())


def a_turn(ready, tmp_path, method=None, training=SGD, who="client4", number=1, state=None):
    """A client's turn from the fresh state: its upload, and what it keeps."""
    method = method or ready.method
    private = ClientStore(tmp_path / f"private-{who}")
    here = dataclasses.replace(ready.runtime, method=method, training=training, clients=private)
    state = method.start(ready.fresh(), ready.context(0)) if state is None else state
    handed = method.handout(state, ready.clients[who], ready.context(number))
    data = turns.turn(TurnRequest(who, number, wire.encode_download(handed, torch.float32)), here)
    path = tmp_path / "upload"
    path.write_bytes(data)
    upload = wire.open_upload(path)
    aux = {name: copied(adapter) for name, adapter in upload.aux.items()}
    upload = dataclasses.replace(upload, adapter=copied(upload.adapter), aux=aux)
    return upload, private.private(who, number + 1)


def copied(adapter) -> Adapter:
    return Adapter({m: Factors(f.B.clone(), f.A.clone()) for m, f in adapter.items()})


def entries(adapter) -> torch.Tensor:
    return torch.cat([x.flatten() for f in adapter.values() for x in (f.B, f.A)])


@pytest.mark.parametrize("name", methods.names())
def test_a_client_of_any_method_stays_nearer_to_its_start(folder, tmp_path, name):
    """The way it goes under a strong pull is another one; under none the same to the bit."""
    ready = ready_for(folder, name)
    training = dataclasses.replace(SGD, epochs=2)
    plain, free, pulled = (
        entries(a_turn(ready, tmp_path, method, training)[0].adapter)
        for method in (None, *(FedProx(s).wrap(ready.method, training) for s in (0.0, 3.0)))
    )
    assert torch.equal(free, plain)
    assert pulled.shape == plain.shape
    assert (pulled - plain).norm() > 1e-4 * plain.norm()


def test_the_stronger_the_nearer(folder, tmp_path):
    ready = ready_for(folder, "flexlora")
    state = ready.method.start(ready.fresh(), ready.context(0))
    state = aggregated(ready.method, state, [a_turn(ready, tmp_path)[0]], ready.context(1))
    handed = ready.method.handout(state, ready.clients["client4"], ready.context(2)).adapter
    ways = []
    for strength in (0.0, 0.03, 0.3, 3.0):
        method = FedProx(strength).wrap(ready.method, SGD)
        training = dataclasses.replace(SGD, epochs=3, batch_examples=4)
        got = a_turn(ready, tmp_path, method, training, number=2, state=state)[0].adapter
        ways.append(max(float((product(got[m]) - product(handed[m])).norm()) for m in got))
    assert ways == sorted(ways, reverse=True)
    assert ways[-1] < 0.9 * ways[0]


def test_fedprox_goes_with_a_server_optimizer(folder, tmp_path):
    ready = ready_for(
        folder,
        "flexlora",
        server_optimizer={"name": "fedavgm"},
        regularizer={"name": "fedprox", "strength": 0.5},
        federation={"rounds": 2},
        evaluation={"seen_clients": 0},
    )
    assert isinstance(ready.method, WithFedProx) and isinstance(
        ready.method.inner, WithServerOptimizer
    )
    assert "FedProx 0.5" in ready.method.title and "FedAvgM" in ready.method.title
    events = list(rounds.run(ready, tmp_path / "run"))
    assert [event["round"] for event in events if event["event"] == "round"] == [1, 2]
    assert set(adapters_of(checkpoint.load(tmp_path / "run").state)) == {"model", "momentum"}


def test_fedprox_leaves_the_servers_half_alone():
    method = made("raflora")
    clients = clients_of(method)
    got = played(FedProx(0.5).wrap(method, SGD), clients, 2)
    want = played(method, clients, 2)
    assert torch.equal(entries(got.model), entries(want.model))


# --- SCAFFOLD ------------------------------------------------------------------------------

SAME = {"model.q": 3, "model.up": 2}


def scaffold(name="fedit", training=SGD) -> WithScaffold:
    return Scaffold().wrap(made(name), training)


@dataclasses.dataclass(frozen=True)
class Quadratic:
    """A client's loss ``1/2 ||(B A - T) H||^2`` of each module, and SGD on it as clients do it."""

    targets: dict
    bends: dict
    training: Training
    steps: int

    @classmethod
    def of(cls, number, training, steps):
        return cls(
            {
                m: random_factors(o, 9, i, 10 * number + 1).B @ random_factors(o, 9, i, 3).A / 9
                for m, (o, i) in SHAPES.items()
            },
            {
                m: torch.eye(i) + 0.15 * random_factors(i, i, i, 10 * number + 2).B
                for m, (_, i) in SHAPES.items()
            },
            training,
            steps,
        )

    def loss(self, module, f):
        return 0.5 * ((f.B @ f.A - self.targets[module]) @ self.bends[module]).square().sum()

    def trained(self, method, start, number) -> Adapter:
        scale = self.training.scale
        raw = {m: leaves(Factors(f.B / scale(f.rank), f.A)) for m, f in start.adapter.items()}
        for step in range(self.steps):
            now = {m: Factors(f.B * scale(f.rank), f.A) for m, f in raw.items()}
            loss = sum(self.loss(m, f) for m, f in now.items())
            extra = method.penalty(now, start)
            loss = loss if extra is None else loss + extra
            parts = [x for f in raw.values() for x in ((f.B, f.A)[: len(start.factors)])]
            rate = self.training.rate(step, self.steps, number)
            for x, gradient in zip(parts, torch.autograd.grad(loss, parts), strict=True):
                x.data -= rate * gradient
        return Adapter(
            {m: Factors((f.B * scale(f.rank)).detach(), f.A.detach()) for m, f in raw.items()}
        )


def federated(method, training, rounds, cohorts=None, steps=8, state=None):
    """SGD on each client's own quadratic loss; the state and what clients keep at the end."""
    clients = clients_of(method, [SAME] * 3)
    losses = [Quadratic.of(i, training, steps) for i in range(3)]
    state = state or first_state(method, clients)
    kept = {c.id: {} for c in clients}
    for number in range(1, rounds + 1):
        here = [0, 1, 2] if cohorts is None else cohorts[number % len(cohorts)]
        context = context_of(number, clients)
        uploads = []
        for index in here:
            each = clients[index]
            start = opened(method, state, each, context, kept[each.id])
            turn = Turn(start, losses[index].trained(method, start, number), steps, number)
            kept[each.id] = method.private_from(turn)
            sent, aux = method.upload_from(turn), method.aux_from(turn)
            uploads.append(Upload(each.id, number, sent, each.examples, aux=aux))
        state = aggregated(method, state, uploads, context)
    return state, kept, clients, losses


def optimum(state, clients, losses, module):
    """The B of the least weighted loss, with A as it is."""
    A = state.model[module].A
    n = [c.examples for c in clients]
    G = [loss.bends[module] @ loss.bends[module].T for loss in losses]
    left = sum(k * loss.targets[module] @ g @ A.T for k, loss, g in zip(n, losses, G, strict=True))
    right = sum(k * A @ g @ A.T for k, g in zip(n, G, strict=True))
    return left @ torch.linalg.inv(right)


@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_drift_is_corrected(schedule):
    """The paper's claim: clients that make several steps on losses of their own reach the
    optimum of the mean loss, where FedAvg stands still beside it. A is frozen (FFA-LoRA)."""
    training = dataclasses.replace(SGD, schedule=schedule, alpha=3.0)
    errors = {}
    for name, method in (("plain", made("ffalora")), ("scaffold", scaffold("ffalora", training))):
        state, _, clients, losses = federated(method, training, 100, steps=5)
        errors[name] = max(
            relative_error(state.model[m].B, optimum(state, clients, losses, m)) for m in SHAPES
        )
    assert errors["plain"] > 0.05
    assert errors["scaffold"] < 1e-3


def test_drift_is_corrected_with_a_part_of_the_clients_in_each_round():
    training = dataclasses.replace(SGD, learning_rate=0.03, alpha=3.0)
    how = {"cohorts": [[0, 1], [1, 2], [2, 0]], "steps": 5}
    state, _, clients, losses = federated(scaffold("ffalora", training), training, 150, **how)
    plain, *_ = federated(made("ffalora"), training, 150, **how)
    for module in SHAPES:
        want = optimum(state, clients, losses, module)
        assert relative_error(plain.model[module].B, want) > 0.02
        assert relative_error(state.model[module].B, want) < 1e-3


@pytest.mark.parametrize("name", ["fedit", "ffalora"])
def test_a_control_is_the_mean_gradient_in_the_effective_factors(name):
    """Of the turn's steps, whatever the LoRA scale, also when a correction took part in them."""
    found = []
    for alpha in (2.0, 6.0):
        # The same way: B moves by scale^2 times the rate.
        training = dataclasses.replace(SGD, alpha=alpha, learning_rate=1e-7)
        method = scaffold(name, training)
        past = played(made(name), clients_of(method, [SAME] * 3), 1)
        state, kept, clients, losses = federated(method, training, 2, steps=3, state=past)
        for each, loss in zip(clients, losses, strict=True):
            for module in SHAPES:
                f = leaves(state.model[module])
                gradients = torch.autograd.grad(loss.loss(module, f), [f.B, f.A])
                control = kept[each.id][CONTROL][module]
                assert relative_error(control.B, gradients[0]) < 1e-4
                if name == "fedit":
                    assert relative_error(control.A, gradients[1]) < 1e-4
                else:
                    assert control.A.shape == (SAME[module], 0)
                found.append(control.B)
    for one, other in zip(found[:6], found[6:], strict=True):
        assert relative_error(one, other) < 1e-4


@pytest.mark.parametrize("cohorts", [None, [[0, 1], [1, 2], [2, 0]], [[1]]])
def test_the_server_has_the_mean_of_the_controls_of_those_it_heard(cohorts):
    state, kept, clients, _ = federated(scaffold(), SGD, 4, cohorts, steps=2)
    heard = [c for c in clients if kept[c.id]]
    assert state.per_client[HEARD] == {c.id: c.examples for c in heard}
    total = sum(c.examples for c in heard)
    for module in SHAPES:
        for half in ("B", "A"):
            want = sum(
                c.examples / total * getattr(kept[c.id][CONTROL][module], half) for c in heard
            )
            got = getattr(state.memory[CONTROL][module], half)
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


def test_uniform_methods_have_uniform_means():
    method = Scaffold().wrap(made("fedit", weights="uniform"), SGD)
    state, kept, clients, _ = federated(method, SGD, 2, steps=2)
    for module in SHAPES:
        want = sum(kept[c.id][CONTROL][module].B for c in clients) / 3
        torch.testing.assert_close(state.memory[CONTROL][module].B, want, rtol=1e-9, atol=1e-12)


def test_order_of_clients_is_irrelevant():
    one, other = (
        federated(scaffold(), SGD, 3, [order], steps=2)[0] for order in ([0, 1, 2], [2, 0, 1])
    )
    for name in ("model", CONTROL):
        got, want = (entries(adapters_of(state)[name])[None] for state in (one, other))
        assert relative_error(got, want) < 1e-9


def test_nobody_is_corrected_in_the_first_turn_and_somebody_new_never():
    method = scaffold()
    state, kept, clients, _ = federated(method, SGD, 2, [[0, 1]], steps=2)
    now = {m: leaves(f) for m, f in state.model.items()}
    context = context_of(3, clients)
    new, known = (opened(method, state, clients[i], context, kept[clients[i].id]) for i in (2, 0))
    assert set(new.aux) == {CONTROL} and method.penalty(now, new) is None
    assert set(known.aux) == {CONTROL, OWN}
    gradient = torch.autograd.grad(method.penalty(now, known), now["model.q"].B)[0]
    own = kept[clients[0].id][CONTROL]["model.q"].B
    torch.testing.assert_close(gradient, state.memory[CONTROL]["model.q"].B - own)


def test_the_first_round_is_the_methods():
    plain, controlled = (federated(m, SGD, 1, steps=2)[0] for m in (made("fedit"), scaffold()))
    assert torch.equal(entries(plain.model), entries(controlled.model))


def test_a_step_gains_the_correction(folder, tmp_path):
    """Through the real training: one step of SGD, with LoRA's scale 4 / 3."""
    ready = ready_for(folder, "fedit")
    training = dataclasses.replace(SGD, max_steps=1)
    method = Scaffold().wrap(ready.method, training)
    upload, kept = a_turn(ready, tmp_path, method, training)
    assert set(upload.aux) == set(kept) == {CONTROL}
    assert set(upload.adapter) == set(kept[CONTROL]) == set(ready.base.shapes)
    other, _ = a_turn(ready, tmp_path, method, training, "client1")
    state = method.start(ready.fresh(), ready.context(0))
    state = aggregated(method, state, [upload, other], ready.context(1))
    # The same client, from the same state and on the same rows, with and without a control.
    corrected, _ = a_turn(ready, tmp_path, method, training, number=2, state=state)
    kept = copied(kept[CONTROL])
    (tmp_path / "private-client4").rename(tmp_path / "away")
    plain, _ = a_turn(ready, tmp_path, method, training, number=2, state=state)
    scale = 4 / 3
    for module in ready.base.shapes:
        c, own = state.memory[CONTROL][module], kept[module]
        for half, gain in (("B", scale**2), ("A", 1.0)):
            moved = getattr(corrected.adapter[module], half) - getattr(plain.adapter[module], half)
            want = -0.1 * gain * (getattr(c, half) - getattr(own, half))
            torch.testing.assert_close(moved, want, rtol=1e-3, atol=1e-6)
        # The control is a gradient: the correction had no part in it.
        f = plain.aux[CONTROL][module]
        change = corrected.aux[CONTROL][module]
        torch.testing.assert_close(change.B + own.B, f.B, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["fedit", "ffalora"])
def test_a_run_keeps_controls_on_both_sides_and_goes_on_with_them(folder, tmp_path, name):
    how = {
        "regularizer": {"name": "scaffold"},
        "training": {"optimizer": "sgd", "learning_rate": 0.1},
        "evaluation": {"seen_clients": 0},
        "same": True,
    }
    whole = ready_for(folder, name, **how)
    list(rounds.run(whole, tmp_path / "whole"))
    list(rounds.run(ready_for(folder, name, **how, federation={"rounds": 2}), tmp_path / "again"))
    list(rounds.run(whole, tmp_path / "again", resume=True))
    states = [checkpoint.load(tmp_path / each).state for each in ("whole", "again")]
    for name in ("model", CONTROL):
        assert torch.equal(*(entries(adapters_of(state)[name]) for state in states))
    heard, private = states[0].per_client[HEARD], ClientStore(tmp_path / "whole" / "private")
    assert 4 <= len(heard) <= 6
    module = "model.layers.0.mlp.up_proj"
    own = {id: private.private(id, 99)[CONTROL][module].B for id in heard}
    want = sum(n * own[id] for id, n in heard.items()) / sum(heard.values())
    got = states[0].memory[CONTROL][module].B
    assert float(want.norm()) > 0
    assert relative_error(got, want) < 1e-5


def test_a_control_of_another_shape_is_refused(folder, tmp_path):
    ready = ready_for(folder, "fedit")
    method = Scaffold().wrap(ready.method, SGD)
    upload, _ = a_turn(ready, tmp_path, method)
    who, state = ready.clients["client4"], method.start(ready.fresh(), ready.context(0))
    expected = method.upload_spec(state, who, ready.context(1))
    validate.upload(upload, who, 1, expected)
    module = next(iter(ready.base.shapes))
    f = upload.aux[CONTROL][module]
    for changed, message in (
        (Factors(f.B[1:], f.A), r"\(out, in\)"),
        (f.first(2), "rank 2"),
        (Factors(f.B * math.nan, f.A), "NaN"),
    ):
        bad = {CONTROL: Adapter({**upload.aux[CONTROL], module: changed})}
        with pytest.raises(ValueError, match=message):
            validate.upload(dataclasses.replace(upload, aux=bad), who, 1, expected)
    without = {CONTROL: upload.aux[CONTROL].only(set(ready.base.shapes) - {module})}
    for aux, message in ((without, "lacks"), ({}, r"lacks \['aux control'\]")):
        with pytest.raises(ValueError, match=message):
            validate.upload(dataclasses.replace(upload, aux=aux), who, 1, expected)


# --- what composes -------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in methods.names() if n not in ("fedit", "ffalora")])
def test_methods_whose_factors_change_their_meaning_are_refused(name):
    with pytest.raises(ValueError, match="does not support common factors") as caught:
        scaffold(name)
    assert made(name).title in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "adamw"}, r"training\.optimizer is 'adamw'; set it to 'sgd'"),
        ({"momentum": 0.9}, r"training\.momentum is 0\.9; set it to 0"),
        ({"weight_decay": 0.1}, r"training\.weight_decay is 0\.1; set it to 0"),
    ],
)
def test_steps_that_are_no_gradients_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        scaffold(training=dataclasses.replace(SGD, **changes))


def test_unequal_ranks_are_refused_with_scaffold(folder):
    how = models.settings(
        folder,
        method={"name": "ffalora"},
        regularizer={"name": "scaffold"},
        training={"optimizer": "sgd"},
    )
    with pytest.raises(
        ValueError, match="SCAFFOLD does not support mixed ranks: it needs one rank for all clients"
    ):
        setup.prepare(how, models.corpus())


def test_scaffold_with_adamw_is_refused_at_start_up(folder):
    with pytest.raises(ValueError, match=r"training\.optimizer is 'adamw'"):
        ready_for(folder, "fedit", regularizer={"name": "scaffold"})


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"strength": 0.1}, r"regularizer\.name' is missing; it is one of fedprox, scaffold"),
        ({"name": "fedprx"}, "no regularizer 'fedprx'. Did you mean 'fedprox'"),
        ({"name": "fedprox", "strenght": 1.0}, "Did you mean 'strength'"),
        ({"name": "fedprox", "strength": -1.0}, "not negative, got -1.0"),
        ({"name": "scaffold", "strength": 1.0}, "has no option 'strength'"),
    ],
)
def test_a_section_is_checked_before_anything_runs(folder, section, message):
    with pytest.raises(ConfigError, match=message):
        models.settings(folder, regularizer=section)


def test_a_kind_is_a_file_that_says_its_paper():
    assert regularizers.names() == ["fedprox", "scaffold"]
    for name in regularizers.names():
        found = regularizers.make({"name": name})
        assert type(found).__name__.lower() == name
        assert found.title and found.paper.startswith("arXiv ")


def test_without_a_section_the_method_is_as_it_is(folder):
    assert type(ready_for(folder, "flexlora").method) is methods.kind("flexlora")


def test_a_wrapped_turn_is_the_methods_but_for_the_penalty():
    method = made("flexlora")
    clients = clients_of(method)
    state = played(method, clients, 1)
    context, learn = context_of(2, clients), noise(method, 2)
    one, other = (
        client_turn(m, state, clients[0], context, learn)
        for m in (method, FedProx().wrap(method, SGD))
    )
    assert torch.equal(entries(one.upload.adapter), entries(other.upload.adapter))
