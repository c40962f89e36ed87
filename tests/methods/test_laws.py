"""Every method against every law. All sizes differ pairwise, so that no transpose can hide."""

import dataclasses

import pytest
import torch

from flexlora import methods, wire
from flexlora.federation import checkpoint
from flexlora.federation.client_store import ClientStore
from flexlora.lowrank.factors import Adapter, Factors
from flexlora.method import partial_step
from flexlora.method.interface import Upload
from flexlora.wire import validate
from support.factors import random_factors
from support.oracle import best, product, relative_error
from support.rounds import (
    EXAMPLES,
    SHAPES,
    clients_of,
    draw_of,
    jolt,
    made,
    merged,
    opened,
    played,
    started,
    turn,
)

ALL = methods.names()

WHOLE = {"florist": {"energy": 1.0}, "flasc": {"density_down": 1.0, "density_up": 1.0}}
"""Options without which a method drops a part of the aggregate by design."""

NO_GAUGE = {
    "raflora": "its terms are averaged one by one, so that their order and basis matter",
    "ffalora": "A is not trained",
    "fedsvd": "A is not trained",
    "rolora": "one half is trained at a time",
    "loraa2": "one half is trained at a time",
    "fslora": "clients send changes of factors",
    "flasc": "clients send changes of factors",
    "fedrotlora": "clients turn their factors themselves",
    "fedsalora": "A alone is shared",
    "ravan": "clients train cores between frozen bases",
    "fedtt": "clients train the cores of a tensor train",
    "slora": "clients train single entries",
}


@pytest.fixture(params=ALL)
def method(request):
    return made(request.param)


@pytest.fixture
def whole(method):
    """The method with nothing dropped by design."""
    return dataclasses.replace(method, **WHOLE.get(type(method).__name__.lower(), {}))


@pytest.fixture
def clients(method):
    return clients_of(method)


@pytest.fixture
def state(method, clients):
    """A state with a past: two rounds in which everybody learnt something."""
    return played(method, clients, 2, lambda number: jolt(number, method=method))


@pytest.fixture
def turns(method, state, clients):
    return [turn(method, state, c, 3, jolt(3, method=method)) for c in clients]


@pytest.fixture
def uploads(turns):
    return [t.upload for t in turns]


def name(method):
    return type(method).__name__.lower()


def update(method, state, uploads):
    """The update after aggregation; of a personal method what is shared, as an update."""
    after = method.aggregate(state, uploads)
    if not method.personal:
        return method.update(after)
    ones = {m: torch.ones(f.shape[0], f.rank) for m, f in after.adapters["global"].items()}
    return Adapter({m: Factors(ones[m].double(), f.A) for m, f in after.adapters["global"].items()})


def assert_same(got, want, tolerance=1e-9):
    for module in SHAPES:
        assert relative_error(product(got[module]), product(want[module])) < tolerance


def test_order_of_clients_is_irrelevant(method, state, uploads):
    assert_same(update(method, state, uploads[::-1]), update(method, state, uploads))


def test_weights_are_relative(method, state, uploads):
    heavier = [dataclasses.replace(u, examples=3 * u.examples) for u in uploads]
    assert_same(update(method, state, heavier), update(method, state, uploads))


@pytest.mark.parametrize("count", [1, 3])
def test_equal_clients_are_a_fixed_point(whole, count):
    """One client, or three alike, of full rank: the update is their model."""
    if whole.personal:
        pytest.skip("there is no global model")
    client = clients_of(whole)[1]
    before = played(whole, [client], 1, lambda number: jolt(number, method=whole))
    one = turn(whole, before, client, 2, jolt(2, method=whole))
    got = whole.update(whole.aggregate(before, [one.upload] * count))
    want = one.model(merged(before))
    for module in SHAPES:
        assert relative_error(product(got[module]), want[module]) < 1e-6


def test_exact_is_as_declared(method, state, turns):
    """Against the dense float64 mean of the clients' whole models, cut to the rank kept."""
    if method.personal:
        pytest.skip("there is no global model")
    got = method.update(method.aggregate(state, [t.upload for t in turns]))
    errors = [
        relative_error(product(got[module]), best(_mean(method, state, turns, module), rank))
        for module, rank in got.ranks.items()
    ]
    # The wire and the state are float64 here, an SVD's null space costs the rest.
    assert (max(errors) < 1e-9) if method.exact else (max(errors) > 1e-3)


def _mean(method, state, turns, module):
    if not method.rank_wise:
        models = [t.model(merged(state))[module] for t in turns]
        return sum(n / sum(EXAMPLES) * model for n, model in zip(EXAMPLES, models, strict=True))
    total = torch.zeros(SHAPES[module], dtype=torch.float64)
    for term in range(max(t.factors[module].rank for t in turns)):
        holders = [t for t in turns if t.factors[module].rank > term]
        for t in holders:
            share = t.client.examples / sum(h.client.examples for h in holders)
            f = t.factors[module]
            total += share * torch.outer(f.B[:, term], f.A[term])
    return total


def test_a_start_has_the_clients_rank_and_is_trainable(method, state, clients):
    for known, number in ((started(method, clients), 1), (state, 3)):
        for client in clients:
            start = opened(method, known, client, number)
            for module, f in start.adapter.items():
                assert f.shape == SHAPES[module]
                trained = (f.A != 0).any(1), (f.B != 0).any(0)
                alive = {"BA": trained[0] | trained[1], "B": trained[0], "A": trained[1]}
                if not _formed(method, start):
                    assert bool(alive[start.halves].all())
            if not method.probes and not _formed(method, start):
                assert start.adapter.ranks == client.ranks


def _formed(method, start):
    return hasattr(method, "form") and method.form(start) is not None


def test_a_client_trains_no_more_than_its_ranks_allow(turns, method):
    for t in turns:
        halves = t.start.halves
        got = sum(
            f.B.numel() * ("B" in halves) + f.A.numel() * ("A" in halves)
            for f in t.start.adapter.values()
        )
        most = sum(r * sum(SHAPES[m]) for m, r in t.client.ranks.items())
        widest = max(max(shape) for shape in SHAPES.values()) * sum(t.client.ranks.values())
        if not _formed(method, t.start):
            assert 0 < got <= (widest if method.probes else most)


def test_gauge_invariance(method, state, clients):
    """(B R, R^-1 A) is the same update; a mean of factors needs one R for all clients."""
    if name(method) in NO_GAUGE:
        pytest.skip(NO_GAUGE[name(method)])
    ranks = None if method.exact else [clients[1].ranks] * 3
    clients = clients_of(method, ranks)
    state = played(method, clients, 2, jolt)

    def turned(learn):
        def learn_turned(client, start):
            learnt = learn(client, start)
            salt = clients.index(client) if method.exact else 0
            return Adapter({m: _rotated(f, salt) for m, f in learnt.items()})

        return learn_turned

    straight, other = (
        [turn(method, state, c, 3, how(jolt(3))).upload for c in clients]
        for how in (lambda learn: learn, turned)
    )
    assert_same(update(method, state, other), update(method, state, straight), 1e-8)


def _rotated(f, salt):
    R = torch.linalg.qr(random_factors(f.rank, f.rank, f.rank, f.rank + salt).B)[0]
    return Factors(f.B @ R, R.T @ f.A)


def numbers(state, uploads):
    adapters = [*state.adapters.values(), *(u.adapter for u in uploads)]
    return [x.clone() for a in adapters for f in a.values() for x in (f.B, f.A)]


def test_inputs_are_not_mutated(method, state, clients, turns, uploads):
    before = numbers(state, uploads)
    for client, t in zip(clients, turns, strict=True):
        method.handout(state, client, draw_of(4))
        method.shares(t.start, t.trained)
    method.aggregate(state, uploads)
    method.update(state)
    after = numbers(state, uploads)
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


def test_state_survives_save_and_load(method, state, clients, uploads, tmp_path):
    """To the bit in float32, which a checkpoint holds: a resumed run is the same run."""
    adapters = {k: a.to(torch.float32) for k, a in state.adapters.items()}
    state = dataclasses.replace(state, adapters=adapters)
    loaded = checkpoint.save(tmp_path, 2, 0, state).state
    assert loaded.facts == state.facts
    for client in clients:
        handed = [
            wire.encode_download(method.handout(s, client, draw_of(3)), torch.float32)
            for s in (state, loaded)
        ]
        assert handed[0] == handed[1]
    got, want = (method.update(method.aggregate(s, uploads)) for s in (loaded, state))
    for module in SHAPES:
        assert torch.equal(got[module].B, want[module].B)
        assert torch.equal(got[module].A, want[module].A)


def test_bytes_counted_are_bytes_encoded(method, state, clients, uploads):
    """A message's length beside its header is four bytes for each number it carries."""
    for client, upload in zip(clients, uploads, strict=True):
        handed = method.handout(state, client, draw_of(3))
        beside = [*([handed.rest] if handed.rest else []), *handed.merge.values()]
        carried = sum(a.parameters for a in [handed.adapter, *beside, *handed.extra.values()])
        data = wire.encode_download(handed, torch.float32)
        if getattr(method, "sparse", False):
            assert _body(data) <= 4 * carried
            continue
        assert _body(data) == 4 * carried
        assert _body(wire.encode_upload(upload, torch.float32)) == 4 * upload.adapter.parameters


def _body(data):
    return len(data) - 8 - int.from_bytes(data[:8], "little")


def test_uploads_are_what_is_expected_and_nothing_else_is(method, state, clients, uploads):
    for client, upload in zip(clients, uploads, strict=True):
        expected = method.expects(state, client, SHAPES)
        sent = dataclasses.replace(upload, adapter=upload.adapter.to(torch.float32))
        validate.upload(sent, client, 3, expected, client.examples)
        larger = {
            m: Factors(
                torch.cat([f.B, f.B.new_ones(f.B.shape[0], 40)], 1),
                torch.cat([f.A, f.A.new_ones(40, f.A.shape[1])], 0),
            )
            for m, f in sent.adapter.items()
        }
        with pytest.raises(ValueError, match=r"rank|numbers its terms"):
            validate.upload(dataclasses.replace(sent, adapter=Adapter(larger)), client, 3, expected)
        wider = {m: Factors(torch.cat([f.B, f.B, f.B[:1]]), f.A) for m, f in sent.adapter.items()}
        for module, f in sent.adapter.items():
            if f.B.numel() == 0:
                wider[module] = Factors(f.B.new_ones(1, f.rank), f.A)
        with pytest.raises(ValueError, match=r"\(out, in\)"):
            validate.upload(dataclasses.replace(sent, adapter=Adapter(wider)), client, 3, expected)


def test_a_client_that_skips_rounds_ends_with_the_same_base(method, clients, tmp_path):
    """Through the files that a client keeps: always there, or there in the last round alone."""
    state, always, late = started(method, clients), *(ClientStore(tmp_path / n) for n in "ab")
    here, other = clients[0], clients[1]
    for number in (1, 2, 3):
        turns = [turn(method, state, c, number, jolt(number, method=method)) for c in (here, other)]
        always.merge(method.handout(state, here, draw_of(number)).merge)
        state = method.aggregate(state, [t.upload for t in turns])
    for memory, client in ((always, here), (late, clients[2])):
        memory.merge(method.handout(state, client, draw_of(4)).merge)
    bases = [_summed(memory.merged(4)) for memory in (always, late)]
    assert bases[0].keys() == bases[1].keys()
    assert all(torch.equal(bases[0][m], bases[1][m]) for m in bases[0])
    assert len(always.merged(4)) == len(merged(state))


def _summed(adapters):
    total = {}
    for adapter in adapters:
        for m, f in adapter.items():
            total[m] = total.get(m, 0) + product(f)
    return total


def test_scale_is_folded_before_aggregation(method, state, turns, uploads):
    """Clients with different alpha but equal products give equal results.

    Factors hold no alpha: a client of scale s that trained B/s uploads s * (B/s).
    """
    scales = [0.5, 2.0, 4.0]
    folded = [
        method.shares(
            t.start, Adapter({m: Factors(s * (f.B / s), f.A) for m, f in t.trained.items()})
        )
        for s, t in zip(scales, turns, strict=True)
    ]
    again = [dataclasses.replace(u, adapter=a) for u, a in zip(uploads, folded, strict=True)]
    assert_same(update(method, state, again), update(method, state, uploads))


def test_every_file_holds_one_method_and_says_its_paper():
    for each in ALL:
        kind = methods.kind(each)
        assert kind.__name__.lower() == each
        assert kind.paper.startswith("arXiv ") or each == "flexfold"
        assert kind.title and isinstance(kind.exact, bool)


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(ValueError, match="Did you mean 'flexlora'"):
        methods.make("flexlra")
    with pytest.raises(ValueError, match=r"no option 'splt'.*Did you mean 'split'"):
        methods.make("flexlora", {"splt": "left"})


def test_an_upload_carries_its_terms(method, uploads, tmp_path):
    """Over the wire and back, to the bit."""
    for number, upload in enumerate(uploads):
        path = tmp_path / str(number)
        path.write_bytes(wire.encode_upload(upload, torch.float64))
        back = wire.open_upload(path)
        assert isinstance(back, Upload)
        assert back.terms == {m: tuple(t) for m, t in upload.terms.items()}
        assert back.adapter.ranks == upload.adapter.ranks
        for module, f in upload.adapter.items():
            assert torch.equal(back.adapter[module].B, f.B)
            assert torch.equal(back.adapter[module].A, f.A)


APART = {
    "z.q": (11, 7),
    "z.up": (13, 5),
    "a.q": (12, 9),
    "m.down": (8, 10),
    "b.k": (6, 14),
    "c.v": (15, 4),
}
"""Modules in an order that is not that of their names, in which a checkpoint's are read."""


def test_a_server_step_in_parts_is_the_whole_one_to_the_bit(method, tmp_path):
    """However the modules are split, from memory and from the disk.

    Parts of several modules have the whole one's order too, in which the journal adds them up.
    """
    if not method.by_module:
        pytest.skip("it decides over all modules at once")
    mixed = ([2, 1, 2, 3, 1, 2], [3, 4, 2, 2, 3, 1], [5, 3, 4, 4, 2, 4])
    ranks = mixed if method.mixed_ranks else [mixed[0]] * 3
    clients = clients_of(method, [dict(zip(APART, each, strict=True)) for each in ranks])
    state, kept = started(method, clients, APART), dict.fromkeys(c.id for c in clients)
    for number in (1, 2, 3, 4):
        learn = jolt(number, method=method)
        turns = [turn(method, state, c, number, learn, kept[c.id], APART) for c in clients]
        kept = {t.client.id: t.kept for t in turns}
        uploads = [_written(t.upload, tmp_path / t.client.id) for t in turns]
        want = method.aggregate(state, uploads)
        modules = list(state.adapters["global"])
        for split in ([[m] for m in modules], [modules[1::2], modules[::2][::-1]], [modules]):
            found = [partial_step.aggregated(method, state, uploads, each) for each in split]
            assert_equal(partial_step.joined(state, found), want, ordered=len(split) < len(modules))
        state = want if number % 2 else checkpoint.save(tmp_path, number, 0, want).state


def _written(upload, path):
    path.write_bytes(wire.encode_upload(upload, torch.float32))
    return wire.open_upload(path)


def assert_equal(got, want, ordered):
    assert got.facts == want.facts and list(got.adapters) == list(want.adapters)
    for name, adapter in want.adapters.items():
        assert set(got.adapters[name]) == set(adapter)
        assert list(got.adapters[name]) == list(adapter) or not ordered
        for module, f in adapter.items():
            assert torch.equal(got.adapters[name][module].B, f.B)
            assert torch.equal(got.adapters[name][module].A, f.A)
