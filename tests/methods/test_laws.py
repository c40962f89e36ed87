"""Every method against every law. All sizes differ pairwise, so that no transpose can hide."""

import copy

import pytest
import torch

from flexlora import methods, wire
from flexlora.adapter import Adapter, Factors
from flexlora.method import Client, Upload
from flexlora.seeds import rng
from ingredients import random_factors
from oracle import product, relative_error, weighted_sum

SHAPES = {"model.q": (11, 7), "model.up": (13, 5)}
EXAMPLES = [13, 17, 29]
ALL = methods.names()


def draw(module):
    return rng(5, "handout", module)


def ranks_of(method):
    """Three clients' ranks by module: mixed where the method takes them."""
    mixed = [
        {"model.q": 2, "model.up": 1},
        {"model.q": 3, "model.up": 4},
        {"model.q": 6, "model.up": 3},
    ]
    return mixed if method.mixed_ranks else [{"model.q": 3, "model.up": 2}] * 3


def adapter(ranks, seed):
    return Adapter(
        {
            m: random_factors(SHAPES[m][0], r, SHAPES[m][1], seed + i)
            for i, (m, r) in enumerate(ranks.items())
        }
    )


@pytest.fixture(params=ALL)
def method(request):
    return methods.make(request.param)


@pytest.fixture
def clients(method):
    return [
        Client(f"c{i}", ranks, f"type{i}", n)
        for i, (ranks, n) in enumerate(zip(ranks_of(method), EXAMPLES, strict=True))
    ]


@pytest.fixture
def uploads(clients):
    return [
        Upload(c.id, 1, adapter(c.ranks, 10 * i + 1), c.examples) for i, c in enumerate(clients)
    ]


@pytest.fixture
def state(method, clients):
    """A start at ranks that lose nothing: at least those of any sum of these clients."""
    top = {
        m: (max(c.ranks[m] for c in clients) if not method.exact else min(SHAPES[m]))
        for m in SHAPES
    }
    return method.start(adapter(top, 77))


def products(a):
    return {m: product(f) for m, f in a.items()}


def assert_same(got, want, tolerance=1e-9):
    for module in SHAPES:
        assert relative_error(product(got[module]), product(want[module])) < tolerance


def aggregate(method, state, uploads):
    return method.update(method.aggregate(state, uploads))


def test_order_of_clients_is_irrelevant(method, state, uploads):
    assert_same(aggregate(method, state, uploads[::-1]), aggregate(method, state, uploads))


def test_weights_are_relative(method, state, uploads):
    heavier = [Upload(u.client, u.round, u.adapter, 3 * u.examples) for u in uploads]
    assert_same(aggregate(method, state, heavier), aggregate(method, state, uploads))


def test_equal_clients_are_a_fixed_point(method, state, clients):
    """In the terms that they hold; what nobody holds is the method's own business."""
    same = adapter(clients[0].ranks, 3)
    for count in (1, 3):
        twins = [Upload(c.id, 1, same, c.examples) for c in clients[:count]]
        assert_same(aggregate(method, state, twins).first(same.ranks), same)


def test_one_client_is_the_identity_up_to_rank(method, clients, uploads):
    largest = uploads[1]
    start = method.start(adapter(largest.adapter.ranks, 78))
    assert_same(aggregate(method, start, [largest]), largest.adapter)


def test_exact_is_as_declared(method, state, uploads):
    """Against the dense float64 mean of products, with weights by examples."""
    got = aggregate(method, state, uploads)
    total = sum(EXAMPLES)
    errors = [
        relative_error(
            product(got[m]),
            weighted_sum([(u.examples / total, u.adapter[m]) for u in uploads]),
        )
        for m in SHAPES
    ]
    assert (max(errors) < 1e-12) if method.exact else (max(errors) > 1e-3)


def test_a_handout_has_the_clients_rank_and_is_trainable(method, state, clients, uploads):
    for known in (state, method.aggregate(state, uploads)):
        for client in clients:
            handed = method.handout(known, client, draw).adapter
            assert handed.ranks == client.ranks
            for f in handed.values():
                assert bool(((f.B != 0).any(0) | (f.A != 0).any(1)).all())


def test_gauge_invariance(method, state, uploads):
    """(B R, R^-1 A) is the same update; a mean of factors needs one R for all clients."""
    if not method.exact:
        uploads = [
            Upload(u.client, 1, adapter(uploads[0].adapter.ranks, i), u.examples)
            for i, u in enumerate(uploads)
        ]
    turned = [
        Upload(
            u.client,
            1,
            Adapter(
                {
                    m: Factors(f.B @ _rotation(f.rank), _rotation(f.rank).T @ f.A)
                    for m, f in u.adapter.items()
                }
            ),
            u.examples,
        )
        for u in uploads
    ]
    held = (
        {m: max(u.adapter[m].rank for u in uploads) for m in SHAPES}
        if not method.exact
        else {m: 99 for m in SHAPES}
    )
    assert_same(
        aggregate(method, state, turned).first(held),
        aggregate(method, state, uploads).first(held),
    )


def _rotation(rank):
    return torch.linalg.qr(random_factors(rank, rank, rank, rank).B)[0]


def test_inputs_are_not_mutated(method, state, clients, uploads):
    before = copy.deepcopy(
        (products(state.adapters["global"]), [products(u.adapter) for u in uploads])
    )
    for client in clients:
        method.handout(state, client, draw)
    method.returns(uploads[0].adapter, uploads[0].adapter)
    method.aggregate(state, uploads)
    after = (products(state.adapters["global"]), [products(u.adapter) for u in uploads])
    assert all(torch.equal(before[0][m], after[0][m]) for m in SHAPES)
    assert all(
        torch.equal(x[m], y[m]) for x, y in zip(before[1], after[1], strict=True) for m in SHAPES
    )


def test_bytes_counted_are_bytes_encoded(method, state, clients, uploads):
    """A message's length grows by exactly four bytes for each number it carries."""
    for client in clients:
        download = method.handout(state, client, draw)
        data = wire.encode_download(download, torch.float32)
        header = 8 + int.from_bytes(data[:8], "little")
        assert len(data) - header == 4 * download.adapter.parameters
        assert_same(wire.decode_download(data).adapter, download.adapter, 1e-6)


def test_scale_is_folded_before_aggregation(method, state, uploads):
    """Clients with different alpha but equal products give equal results.

    Factors hold no alpha: a client of scale s that trained B/s uploads s * (B/s).
    """
    scales = [0.5, 2.0, 4.0]
    folded = [
        Upload(
            u.client,
            1,
            Adapter({m: Factors(s * (f.B / s), f.A) for m, f in u.adapter.items()}),
            u.examples,
        )
        for s, u in zip(scales, uploads, strict=True)
    ]
    assert_same(aggregate(method, state, folded), aggregate(method, state, uploads))


def test_every_file_holds_one_method_and_says_its_paper():
    for name in ALL:
        kind = methods.kind(name)
        assert kind.__name__.lower() == name
        assert kind.paper.startswith("arXiv ") and kind.title and isinstance(kind.exact, bool)


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(ValueError, match="Did you mean 'flexlora'"):
        methods.make("flexlra")
    with pytest.raises(ValueError, match=r"no option 'splt'.*Did you mean 'split'"):
        methods.make("flexlora", {"splt": "left"})
