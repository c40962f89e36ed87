"""FedTT: trains of cores, their counts, and which of them FedTT+ trains."""

import itertools
from math import prod

import numpy as np
import pytest
import torch

from flexlora import wire
from flexlora.errors import ConfigError
from flexlora.laws.dense import product, relative_error
from flexlora.laws.rounds import (
    EXAMPLES,
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
from flexlora.method import Client
from flexlora.methods import make
from flexlora.methods.fedtt import _matrix, _split

Q = "model.q"


def turns_of(method, state, clients, number):
    context, learn = context_of(number, clients), noise(method, number)
    return [client_turn(method, state, c, context, learn) for c in clients]


def after(method, state, turns, clients, number):
    return aggregated(method, state, [t.upload for t in turns], context_of(number, clients))


def played(method, clients, rounds):
    return after_rounds(method, clients, rounds, lambda number: noise(method, number))


@pytest.mark.parametrize(
    ("size", "parts", "want"),
    [
        (576, 3, [6, 8, 12]),
        (1536, 3, [8, 12, 16]),
        (30, 3, [2, 3, 5]),
        (7, 3, [1, 1, 7]),
        (1, 2, [1, 1]),
    ],
)
def test_sizes_are_split(size, parts, want):
    assert _split(size, parts) == want and prod(want) == size


def test_the_cores_of_a_module_of_smollm2():
    """576 x 1536 at rank 8 and trains of rank 5, core by core."""
    method = make("fedtt")
    B, A = method._shapes(1536, 576, 8)
    assert B == [(1, 8, 2, 5), (5, 12, 2, 5), (5, 16, 2, 1)]
    assert A == [(1, 2, 12, 5), (5, 2, 8, 5), (5, 2, 6, 1)]
    numbers = sum(map(prod, B)) + sum(map(prod, A))
    assert numbers == 840 + 580
    assert 11 * numbers < 8 * (1536 + 576)


@pytest.mark.parametrize("sizes", [(1536, 576, 8), (11, 7, 3), (36, 25, 6)])
@pytest.mark.parametrize("cores", [2, 3, 4])
def test_cores_make_a_chain(sizes, cores):
    out, in_, rank = sizes
    for train, (rows, columns) in zip(
        make("fedtt", {"cores": cores})._shapes(*sizes), ((out, rank), (rank, in_)), strict=True
    ):
        assert len(train) == cores and train[0][0] == train[-1][3] == 1
        assert all(a[3] == b[0] for a, b in itertools.pairwise(train))
        assert prod(s[1] for s in train) == rows and prod(s[2] for s in train) == columns
        assert max(s[3] for s in train) <= 5


def test_an_entry_is_a_product_of_matrices():
    """Row (i1, i2, i3) and column (j1, j2, j3), counted as digits."""
    shapes = [(1, 2, 3, 4), (4, 5, 2, 3), (3, 3, 4, 1)]
    draw = np.random.default_rng(3)
    cores = [torch.from_numpy(draw.normal(size=s)) for s in shapes]
    got = _matrix(shapes, torch.cat([c.flatten() for c in cores]))
    assert got.shape == (30, 24)
    for i, j in (((0, 0, 0), (0, 0, 0)), ((1, 4, 2), (2, 1, 3)), ((1, 2, 0), (0, 1, 2))):
        want = cores[0][:, i[0], j[0]] @ cores[1][:, i[1], j[1]] @ cores[2][:, i[2], j[2]]
        place = (i[0] * 5 + i[1]) * 3 + i[2], (j[0] * 2 + j[1]) * 4 + j[2]
        assert float(got[place]) == pytest.approx(float(want))


def test_ranks_are_no_larger_than_they_can_be():
    """6 x 10 as 2 x 5 and 3 x 2 cells: six numbers on one side bound the rank."""
    assert make("fedtt", {"cores": 2, "train_rank": 99})._train(6, 10) == [
        (1, 2, 5, 6),
        (6, 3, 2, 1),
    ]


def test_the_start_is_no_update_and_has_the_spread_of_lora():
    method, client = make("fedtt"), Client("c0", {"m": 8}, "t", 13)
    shapes = {"m": (288, 192)}
    state = first_state(method, [client], shapes)
    start = opened(method, state, client, context_of(1, [client], shapes))
    f = start.adapter["m"]
    assert f.shape == (288, 192) and f.rank == 8
    assert float(f.B.norm()) == 0
    assert 0.3 < float(f.A.std() * (3 * 192) ** 0.5) < 3
    parametrization = method.parametrize(start)["m"]
    parameters = parametrization.parameters.clone().requires_grad_()
    now = parametrization.factors(parameters)
    (now.B @ now.A).sum().backward()
    first = prod(method._shapes(288, 192, 8)[0][0])
    assert bool(parameters.grad[:first].all()) and not parameters.grad[first:].any()


@pytest.mark.parametrize("plus", [False, True])
def test_bytes_are_those_of_the_cores(plus):
    method = make("fedtt", {"plus": plus})
    clients = clients_of(method)
    state, context = played(method, clients, 2), context_of(3, clients)
    done = turns_of(method, state, clients, 3)[0]
    up = wire.encode_upload(done.upload, torch.float32)
    down = wire.encode_download(method.handout(state, clients[0], context), torch.float32)
    numbers = {"up": 0, "down": 0}
    for module, shape in SHAPES.items():
        chain = [s for train in method._shapes(*shape, clients[0].ranks[module]) for s in train]
        own = [chain[0], chain[1 + 2 % 4], chain[-1]] if plus else chain
        numbers["up"] += sum(map(prod, own))
        numbers["down"] += sum(map(prod, chain))
    assert [len(d) - 8 - int.from_bytes(d[:8], "little") for d in (up, down)] == [
        4 * numbers["up"],
        4 * numbers["down"],
    ]
    assert (numbers["up"] < numbers["down"]) == plus


def test_cores_are_averaged_each_for_itself():
    method = make("fedtt")
    clients = clients_of(method)
    state = played(method, clients, 1)
    turns = turns_of(method, state, clients, 2)
    model = after(method, state, turns, clients, 2).model
    for module in SHAPES:
        want = sum(
            n / sum(EXAMPLES) * t.trained[module].B for n, t in zip(EXAMPLES, turns, strict=True)
        )
        torch.testing.assert_close(model[module].B, want)


def test_plus_trains_first_last_and_one_between_by_turns():
    method = make("fedtt", {"plus": True})
    clients = clients_of(method)
    state, moved = first_state(method, clients), []
    for number in range(1, 6):
        done = turns_of(method, state, clients, number)
        new = after(method, state, done, clients, number)
        chain = [s for train in method._shapes(*SHAPES[Q], 3) for s in train]
        before, now = (s.model[Q].B[:, 0] for s in (state, new))
        pieces = torch.split(before != now, [prod(s) for s in chain])
        moved.append([i for i, piece in enumerate(pieces) if piece.any()])
        assert all(pieces[i].all() for i in moved[-1])
        # What a client has trained is what the server has made of it, if there is no other.
        single = after(method, state, done[:1], clients, number)
        update = method.global_adapter(single, context_of(number, clients))
        assert relative_error(product(update[Q]), product(done[0].factors[Q])) < 1e-9
        state = new
    assert moved == [[0, 1, 5], [0, 2, 5], [0, 3, 5], [0, 4, 5], [0, 1, 5]]


def test_plus_brings_the_mean_nearer_to_that_of_products():
    """From the same cores, over five draws of what the clients learn."""
    plain = make("fedtt")
    clients = clients_of(plain)
    state, context, errors = played(plain, clients, 2), context_of(3, clients), {}
    for plus in (False, True):
        method, errors[plus] = make("fedtt", {"plus": plus}), 0.0
        for salt in range(5):
            learn = noise(method, salt, size=0.3)
            turns = [client_turn(method, state, c, context, learn) for c in clients]
            got = method.global_adapter(after(method, state, turns, clients, 3), context)
            for m in SHAPES:
                models = [t.model()[m] for t in turns]
                mean = sum(n / sum(EXAMPLES) * x for n, x in zip(EXAMPLES, models, strict=True))
                errors[plus] += float((product(got[m]) - mean).norm() / product(got[m]).norm())
    assert 0 < errors[True] < errors[False]


@pytest.mark.parametrize("options", [{"cores": 1}, {"train_rank": 0}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ConfigError, match="cores is at least 2 and train_rank at least 1"):
        make("fedtt", options)
