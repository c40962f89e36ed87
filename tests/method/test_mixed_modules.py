"""Clients that train different modules: whose mean is taken, and what stays as it is."""

import dataclasses

import pytest
import torch

from flexlora import methods, seeds, wire
from flexlora.config.ranks import RankType
from flexlora.errors import ConfigError
from flexlora.federation import checkpoint, compose, rounds, setup
from flexlora.journal.record import Record
from flexlora.laws.rounds import (
    SEED,
    SHAPES,
    after_rounds,
    aggregated,
    client_turn,
    clients_of,
    cohort_of,
    context_of,
    first_state,
    noise,
)
from flexlora.lowrank.factors import Adapter
from flexlora.method import partial_step
from flexlora.method.interface import Feature, FreshAdapters, RoundContext, Upload
from flexlora.method.mixed_modules import for_mixed_modules
from flexlora.method.server_optimizer import MOMENTUM
from flexlora.training.loop import ClientTask
from flexlora.wire import adapters
from support import models
from support.factors import random_factors
from support.learning import train
from support.states import (
    adapters_of,
    assert_same_factors,
    assert_same_state,
    assert_same_values,
)

ATTENTION, FEED_FORWARD = "model.self_attn.q", "model.mlp.up"
BOTH = dict(zip((ATTENTION, FEED_FORWARD), SHAPES.values(), strict=True))
MIXED = [
    {ATTENTION: 2},
    {ATTENTION: 3, FEED_FORWARD: 4},
    {ATTENTION: 6, FEED_FORWARD: 3},
]
SAME = [{ATTENTION: 3}, {ATTENTION: 3, FEED_FORWARD: 2}, {ATTENTION: 3, FEED_FORWARD: 2}]
APART = [name for name in methods.names() if Feature.PER_MODULE in methods.make(name, {}).features]


@pytest.fixture(params=APART)
def method(request):
    return for_mixed_modules(methods.make(request.param, {}))


def some(method):
    """The first trains the attention alone."""
    return clients_of(method, MIXED if Feature.MIXED_RANKS in method.features else SAME)


def round_of(number, clients):
    """The context of a round among clients that may lack modules."""
    largest = {m: max(c.ranks.get(m, 0) for c in clients) for m in BOTH}
    return RoundContext(number, SEED, BOTH, largest)


def begun(method, clients):
    """A state in which everybody, then training all modules, has learnt something."""
    context = round_of(1, clients)
    whole = [dataclasses.replace(c, ranks={**context.ranks, **c.ranks}) for c in clients]
    return after_rounds(method, whole, 1, lambda number: noise(method, number), shapes=BOTH)


def learnt(method, state, clients):
    context, learn = round_of(2, clients), noise(method, 2)
    return [client_turn(method, state, c, context, learn).upload for c in clients]


def test_a_client_is_handed_and_sends_its_own_modules_alone(method):
    clients = some(method)
    state, context = begun(method, clients), round_of(2, clients)
    first = clients[0]
    handed = method.handout(state, first, context)
    assert list(handed.adapter or handed.ranks) == [ATTENTION]
    assert list(learnt(method, state, clients)[0].adapter) == [ATTENTION]
    assert list(method.upload_spec(state, first, context).modules) == [ATTENTION]


def test_what_is_handed_out_travels(method):
    clients = some(method)
    handed = method.handout(begun(method, clients), clients[0], round_of(2, clients))
    there = wire.decode_download(wire.encode_download(handed, torch.float64))
    assert list(there.adapter or there.ranks) == [ATTENTION]
    assert list(there.base_updates) == list(handed.base_updates)


def part_of(upload, module):
    """What an upload holds of a module."""
    ids = {m: numbers for m, numbers in upload.component_ids.items() if m == module}
    return dataclasses.replace(
        upload,
        adapter=upload.adapter.only([module]),
        component_ids=ids,
        aux={name: adapter.only([module]) for name, adapter in upload.aux.items()},
    )


def test_the_mean_of_a_module_is_over_those_who_train_it(method):
    """As if the others, and the other modules, were not there."""
    clients = some(method)
    state, context = begun(method, clients), round_of(2, clients)
    uploads = learnt(method, state, clients)
    after = aggregated(method, state, uploads, context)
    for module, holders in ((ATTENTION, uploads), (FEED_FORWARD, uploads[1:])):
        alone = [part_of(upload, module) for upload in holders]
        part = context.only([module])
        want = aggregated(method.inner, state.only([module]), alone, part)
        got = after.only([module])
        assert adapters_of(got).keys() == adapters_of(want).keys()
        for name, adapter in adapters_of(want).items():
            assert_same_factors(adapters_of(got)[name], adapter)


def test_what_nobody_trains_stays_as_it_is(method):
    clients = some(method)
    state, context = begun(method, clients), round_of(2, clients)
    after = aggregated(method, state, learnt(method, state, clients)[:1], context)
    before = method.global_adapter(state, round_of(1, clients)).only([FEED_FORWARD])
    assert_same_factors(method.global_adapter(after, context).only([FEED_FORWARD]), before)
    # And the round after goes on from there.
    assert aggregated(method, after, learnt(method, after, clients), round_of(3, clients))


def test_with_all_modules_for_all_it_is_the_method_itself(method):
    clients = clients_of(method)
    state = after_rounds(method.inner, clients, 2, lambda number: noise(method, number))
    context = context_of(3, clients)
    learn = noise(method, 3)
    uploads = [client_turn(method, state, c, context, learn).upload for c in clients]
    assert_same_state(
        aggregated(method, state, uploads, context),
        aggregated(method.inner, state, uploads, context),
    )


def test_updates_merged_for_good_are_of_all_modules():
    """In a simulation clients share what their base has merged; and each sees the whole model."""
    method = for_mixed_modules(methods.make("flora", {}))
    clients = some(method)
    state = begun(method, clients)
    stranger = dataclasses.replace(clients[0], id="new")
    for client in (stranger, dataclasses.replace(clients[2], id="other")):
        updates = method.handout(state, client, round_of(2, clients)).base_updates
        assert [list(update) for update in updates.values()] == [list(BOTH)]


def test_a_momentum_begins_with_the_first_who_trains_the_module():
    section = {"name": "fedavgm", "momentum": 0.5}
    training = models.settings(models.Path("x")).training
    method = for_mixed_modules(compose.composed({"name": "flexlora"}, section, None, training))
    clients = some(method)
    largest = dict(zip(BOTH, (6, 4), strict=True))
    state = first_state(method, [dataclasses.replace(clients[0], ranks=largest)], BOTH)
    for number, who in enumerate((clients[:1], clients, clients), start=1):
        context, learn = round_of(number, clients), noise(method, number)
        uploads = [client_turn(method, state, c, context, learn).upload for c in who]
        state = aggregated(method, state, uploads, context)
        assert list(state.memory[MOMENTUM]) == list(BOTH)[: 1 if number == 1 else 2]


@pytest.mark.parametrize("name", sorted(set(methods.names()) - set(APART)))
def test_a_method_that_decides_over_all_modules_is_refused(name):
    with pytest.raises(ConfigError, match="does not support aggregation by module"):
        for_mixed_modules(methods.make(name, {}))


@pytest.mark.parametrize("order", [(ATTENTION, FEED_FORWARD), (FEED_FORWARD, ATTENTION)])
def test_parts_of_a_step_may_have_no_trainer(method, order):
    """As workers take them: the first part too may be one that stays as it was."""
    clients = some(method)
    state, context = begun(method, clients), round_of(2, clients)
    uploads = learnt(method, state, clients)[:1]
    cohort = cohort_of(method, uploads, context)
    want = method.aggregate(state, cohort, context)
    parts = [partial_step.aggregate(method, state, cohort, context, [m]) for m in order]
    got = partial_step.joined(state, parts, context)
    assert_same_values(got, want)
    assert adapters_of(got).keys() == adapters_of(want).keys()
    for name, adapter in adapters_of(want).items():
        assert adapters_of(got)[name].keys() == adapter.keys()


def test_private_halves_of_a_module_begin_with_it():
    """A client that trained the attention alone, and now trains all."""
    method = for_mixed_modules(methods.make("fedsalora", {}))
    clients = some(method)
    state = begun(method, clients)
    private = client_turn(method, state, clients[0], round_of(2, clients), noise(method, 2)).private
    more = dataclasses.replace(clients[0], ranks=clients[1].ranks)
    handed = method.handout(state, more, round_of(3, clients))
    start = method.prepare(handed, private, FreshAdapters(BOTH, SEED, more.id, 3))
    assert start.adapter[ATTENTION].B.any() and not start.adapter[FEED_FORWARD].B.any()


# With the tiny model.

TYPES = {
    "phone": {"attention": 2, "feed_forward": 0},
    "site": {"attention": 3, "feed_forward": 5},
}
RANKS = {"types": TYPES, "distribution": {"phone": 0.5, "site": 0.5}}


def ran(folder, where, **changes):
    settings = models.settings(folder, **{"ranks": RANKS, **changes})
    ready = setup.prepare(settings, models.corpus())
    return ready, list(rounds.run(ready, where))


@pytest.mark.parametrize("name", ["flexlora", "flexfold", "flora", "fedsalora"])
@pytest.mark.parametrize("together", [1, 3])
def test_a_federation_of_phones_and_sites_runs(folder, tmp_path, name, together):
    run = {"threads": 1, "clients_at_once": together}
    least = 2 if Feature.MIXED_RANKS in methods.make(name, {}).features else 3
    types = {**TYPES, "phone": {"attention": least, "feed_forward": 0}}
    ranks = {**RANKS, "types": types}
    ready, events = ran(folder, tmp_path / "run", method={"name": name}, run=run, ranks=ranks)
    assert events[-1]["event"] == "finish"
    assert ready.ranks == RankType(3, 5).by_module(list(ready.base.shapes))
    sizes = {}
    for event in Record(tmp_path / "run").events("client"):
        sizes.setdefault(event["rank_type"], set()).add(event["bytes_up"])
    assert max(sizes["phone"]) < min(sizes["site"]) / 2
    assert events[0]["ranks"] == {"phone": [0, least], "site": [3, 5]}


def test_clients_that_train_together_have_the_numbers_of_those_alone(folder, tmp_path):
    found = []
    for together in (1, 4):
        where = tmp_path / str(together)
        run = {"threads": 1, "clients_at_once": together}
        ready, _ = ran(folder, where, run=run)
        state = checkpoint.load(where).state
        found.append(ready.method.global_adapter(state, ready.context(3)))
    one, other = found
    for module, f in one.items():
        assert torch.allclose(f.B @ f.A, other[module].B @ other[module].A, atol=1e-5)


def test_updates_beside_the_base_are_seen_in_modules_that_are_not_trained(folder):
    """Where a base cannot hold what is merged, it is seen beside it, as if it did."""
    ready = setup.prepare(models.settings(folder, ranks=RANKS), models.corpus())
    shapes, here = ready.base.shapes, ready.runtime
    ranks = RankType(2, 0).by_module(list(shapes))
    others = [m for m in shapes if m not in ranks]
    rest = {m: random_factors(shapes[m][0], 3, shapes[m][1], n) for n, m in enumerate(others)}
    beside = Adapter(rest).to(torch.float32)

    def loss(rest, folded):
        start = FreshAdapters(shapes, 1).common(ranks)
        learner = ClientTask("a client", start, range(4), seeds.rng(1, "rows"), rest=rest)
        with ready.base.folded(folded):
            return train(ready.base, learner, here.store, here.training).loss_total

    assert loss(beside, []) == pytest.approx(loss(None, [beside]), rel=1e-4)
    assert abs(loss(beside, []) / loss(None, []) - 1) > 1e-3


def test_updates_merged_for_good_are_not_read_by_a_step(folder, tmp_path, monkeypatch):
    """They grow with the rounds, and stay in their files."""
    how = {"method": {"name": "flora"}, "federation": {"rounds": 2, "cohort": 6}}
    ready, _ = ran(folder, tmp_path / "run", **how)
    state = checkpoint.load(tmp_path / "run").state
    everybody = ready.clients.values()
    uploads = [
        Upload(c.id, 3, FreshAdapters(ready.shapes, 1, c.id).own(c.ranks), c.examples)
        for c in everybody
    ]
    read, taken = adapters.StoredModules.__getitem__, []

    def counted(stored, module):
        taken.append(stored.path.name)
        return read(stored, module)

    monkeypatch.setattr(adapters.StoredModules, "__getitem__", counted)
    after = aggregated(ready.method, state, uploads, ready.context(3))
    assert not [name for name in taken if name.startswith("update")]
    assert after.merge_log.updates[1] is state.merge_log.updates[1]


def test_modules_that_nobody_trained_yet_have_no_part_in_the_spectrum(folder, tmp_path):
    how = {"federation": {"rounds": 1, "cohort": 1}}
    phones = {"types": TYPES, "clients": {f"client{n}": "phone" for n in range(5)}}
    ranks = {**phones, "distribution": {"site": 1.0}}
    ready, events = ran(folder, tmp_path / "run", ranks=ranks, **how)
    (client,) = (e for e in events if e["event"] == "client")
    assert client["rank_type"] == "phone"
    (spectrum,) = (e for e in events if e["event"] == "spectrum")
    assert spectrum["energy"].keys() == ready.clients.kinds["phone"].keys()


def test_a_type_without_a_module_is_refused(folder):
    types = {**TYPES, "phone": {"attention": 0, "feed_forward": 2}}
    some = {"ranks": {**RANKS, "types": types}, "model": {"targets": ["q_proj", "v_proj"]}}
    with pytest.raises(ValueError, match=r"Clients of type 'phone' train nothing"):
        setup.prepare(models.settings(folder, **some), models.corpus())


def test_modules_that_no_client_trains_are_in_no_adapter(folder, tmp_path):
    ranks = {"types": {"phone": TYPES["phone"]}, "distribution": {"phone": 1.0}}
    ready, events = ran(folder, tmp_path / "run", ranks=ranks)
    assert events[-1]["event"] == "finish"
    assert all("self_attn" in module for module in ready.ranks) and ready.ranks


def test_equal_ranks_are_equal_where_a_module_is_trained(folder):
    types = {
        "phone": {"attention": 3, "feed_forward": 0},
        "site": {"attention": 3, "feed_forward": 5},
    }
    ranks = {**RANKS, "types": types}
    settings = models.settings(folder, ranks=ranks, method={"name": "fedit"})
    assert setup.prepare(settings, models.corpus()).method.title.startswith("FedIT")
    with pytest.raises(ValueError, match="needs one rank for all clients"):
        setup.prepare(
            models.settings(folder, ranks=RANKS, method={"name": "fedit"}), models.corpus()
        )


def test_hetlora_says_that_all_must_train_all(folder):
    settings = models.settings(folder, ranks=RANKS, method={"name": "hetlora"})
    with pytest.raises(ValueError, match="every client must train all modules"):
        setup.prepare(settings, models.corpus())


def test_a_type_that_trains_nothing_is_refused_with_its_name(folder):
    types = {**TYPES, "idle": {"attention": 0, "feed_forward": 0}}
    with pytest.raises(ValueError, match=r"ranks\.types\.idle trains neither"):
        models.settings(folder, ranks={**RANKS, "types": types})
