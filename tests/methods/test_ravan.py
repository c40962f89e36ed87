"""RAVAN: exact means of cores, high rank at LoRA's numbers, heads by budget."""

import dataclasses
from math import isqrt

import pytest
import torch
from support.oracle import product, relative_error
from support.rounds import draw_of, fresh, jolt, made, opened, started, turn

from flexlora import wire
from flexlora.method.interface import Client
from flexlora.methods.ravan import _bases

SHAPES = {"model.q": (41, 29), "model.up": (31, 37)}
Q, UP = SHAPES
EXAMPLES = (13, 17, 29)


def clients_of(*ranks):
    return [
        Client(f"c{i}", {Q: r, UP: max(r - 1, 1)}, f"type{i}", n)
        for i, (r, n) in enumerate(zip(ranks, EXAMPLES, strict=False))
    ]


def turns_of(method, state, clients, number, size=1.0):
    learn = jolt(number, method=method, size=size)
    return [turn(method, state, c, number, learn, shapes=SHAPES) for c in clients]


def begun(method, clients):
    return started(method, clients, SHAPES)


def after(method, state, turns):
    return method.aggregate(state, [t.upload for t in turns])


def whole(turn, module):
    """The client's update, of heads trained and heads seen."""
    rest = product(turn.start.rest[module]) if turn.start.rest else 0
    return product(turn.factors[module]) + rest


def test_bases_are_orthonormal_across_heads_and_alike_on_both_sides():
    method, clients = made("ravan"), clients_of(2, 3, 5)
    state = begun(method, clients)
    for module, shape in SHAPES.items():
        q = isqrt(state.adapters["global"][module].shape[0])
        server = _bases(state.facts["bases"], module, shape, 4 * q)
        B, A = server.B.double(), server.A.double()
        # Of each vector the scale is rounded one and a half times to float32, the product once.
        rounded = 2 * 2.5 * torch.finfo(torch.float32).eps / 2
        for gram in (B.T @ B, A @ A.T):
            torch.testing.assert_close(gram, torch.eye(4 * q).double(), atol=rounded, rtol=0)
        for client in clients:
            start = opened(method, state, client, 1, shapes=SHAPES)
            at = [h * q + i for h in start.terms[module] for i in range(q)]
            assert torch.equal(start.extra["bases"][module].B, server.B[:, at])
            assert torch.equal(start.extra["bases"][module].A, server.A[at])
    assert _bases(1, Q, (5, 3), 2).B.tolist() != _bases(2, Q, (5, 3), 2).B.tolist()


def test_the_start_is_no_update():
    method, clients = made("ravan"), clients_of(2, 3, 5)
    state = begun(method, clients)
    assert all(float(product(f).norm()) == 0 for f in method.update(state).values())
    start = opened(method, state, clients[0], 1, shapes=SHAPES)
    for module, form in method.form(start).items():
        assert float(product(start.adapter[module]).norm()) == 0
        assert form.parameters[0] == 1 and float(form.parameters.sum()) == len(start.terms[module])


def test_the_update_is_the_sum_over_heads():
    """Against sum_i s_i B_i H_i A_i, spelt out."""
    method, clients = made("ravan", head_rank=3), clients_of(5)
    done = turns_of(method, begun(method, clients), clients, 1)[0]
    for module in SHAPES:
        bases, heads = done.start.extra["bases"][module], len(done.start.terms[module])
        each, want = done.trained[module].B[:, 0].view(heads, 10), 0
        for i in range(heads):
            B, A = bases.B[:, 3 * i : 3 * i + 3].double(), bases.A[3 * i : 3 * i + 3].double()
            want = want + each[i, 0] * B @ each[i, 1:].view(3, 3) @ A
            sent = done.upload.adapter[module].B[:, i]
            torch.testing.assert_close(sent, each[i, 0] * each[i, 1:])
        assert relative_error(product(done.factors[module]), want) < 1e-12


def test_all_heads_have_the_numbers_of_the_largest_rank_and_several_times_its_rank():
    method, clients = made("ravan"), clients_of(2, 3, 5)
    state = begun(method, clients)
    for module, shape in SHAPES.items():
        most = max(c.ranks[module] for c in clients) * sum(shape)
        assert state.adapters["global"][module].B.numel() <= most
        q = isqrt(state.adapters["global"][module].shape[0])
        assert 4 * (q + 1) ** 2 > most or 4 * (q + 1) > min(shape)
    q = isqrt(state.adapters["global"][Q].shape[0])
    assert 4 * q == 28 > 5 * clients[2].ranks[Q]
    done = turns_of(method, state, clients[2:], 1)
    assert int(torch.linalg.matrix_rank(whole(done[0], Q))) == 4 * q


def test_a_budget_is_in_heads_and_the_bytes_are_their_cores():
    """Rank 1 pays for 70 / 25 of q's heads and 68 / 25 of up's, rank 2 for 140 / 25 of q's."""
    method, clients = made("ravan", head_rank=5), clients_of(1, 2, 5)
    state = begun(method, clients)
    done = turns_of(method, state, clients, 1)
    counts = [[len(t.start.terms[m]) for m in SHAPES] for t in done]
    assert counts == [[2, 2], [4, 2], [4, 4]]
    for t, count in zip(done, counts, strict=True):
        up = wire.encode_upload(t.upload, torch.float32)
        down = wire.encode_download(method.handout(state, t.client, draw_of(1)), torch.float32)
        header = [8 + int.from_bytes(data[:8], "little") for data in (up, down)]
        assert len(up) - header[0] == 4 * 25 * sum(count)
        assert len(down) - header[1] == 4 * 25 * 4 * len(SHAPES)


def test_a_client_below_one_head_trains_one():
    method, clients = made("ravan", heads=2, head_rank=11), clients_of(1)
    start = opened(method, begun(method, clients), clients[0], 1, shapes=SHAPES)
    assert [len(start.terms[m]) for m in SHAPES] == [1, 1]


def test_heads_are_drawn_first_and_then_of_the_largest_norm():
    method, clients = made("ravan", head_rank=7), clients_of(2, 2, 5)
    state = begun(method, clients)
    drawn = {
        tuple(opened(method, state, c, number, shapes=SHAPES).terms[Q])
        for c in clients[:2]
        for number in range(1, 9)
    }
    assert len(drawn) > 3 and all(len(heads) == 2 for heads in drawn)
    state = after(method, state, turns_of(method, state, clients[2:], 1))
    norms = state.adapters["global"][Q].B.norm(dim=0)
    largest = tuple(sorted(norms.argsort(descending=True)[:2].tolist()))
    for number in (2, 3):
        assert opened(method, state, clients[0], number, shapes=SHAPES).terms[Q] == largest


def test_clients_see_the_heads_that_they_do_not_train():
    method, clients = made("ravan", head_rank=7), clients_of(2, 3, 5)
    state = begun(method, clients)
    state = after(method, state, turns_of(method, state, clients, 1))
    for client in clients:
        start = opened(method, state, client, 2, shapes=SHAPES)
        for module in SHAPES:
            seen = product(start.adapter[module]) + product(start.rest[module])
            assert relative_error(seen, product(method.update(state)[module])) < 1e-9


def test_the_mean_is_exact():
    """Where all train all heads: the mean of the updates, dense."""
    method, clients = made("ravan"), clients_of(5, 5, 5)
    state = begun(method, clients)
    for number in (1, 2):
        done = turns_of(method, state, clients, number)
        state = after(method, state, done)
        for module in SHAPES:
            want = sum(
                n / sum(EXAMPLES) * whole(t, module) for n, t in zip(EXAMPLES, done, strict=True)
            )
            assert relative_error(product(method.update(state)[module]), want) < 1e-9


def test_each_head_is_the_mean_over_those_who_trained_it():
    method, clients = made("ravan", head_rank=7), clients_of(2, 3, 1)
    state = begun(method, clients)
    state = after(method, state, turns_of(method, state, clients_of(5), 1))
    done = turns_of(method, state, clients, 2)
    found = after(method, state, done).adapters["global"]
    trained = set()
    for head in range(4):
        held = [t for t in done if head in t.start.terms[Q]]
        total = sum(t.client.examples for t in held)
        want = sum(
            t.client.examples / total * t.upload.adapter[Q].B[:, list(t.start.terms[Q]).index(head)]
            for t in held
        )
        if held:
            torch.testing.assert_close(found[Q].B[:, head], want)
            trained.add(len(held))
        else:
            assert torch.equal(found[Q].B[:, head], state.adapters["global"][Q].B[:, head])
            trained.add(0)
    assert len(trained) > 1


def test_the_update_is_in_the_order_of_an_svd():
    method, clients = made("ravan"), clients_of(5)
    state = begun(method, clients)
    f = method.update(after(method, state, turns_of(method, state, clients, 1)))[Q]
    S = torch.linalg.svdvals(product(f))[: f.rank]
    torch.testing.assert_close(f.B.norm(dim=0), S, rtol=1e-5, atol=1e-6)


def test_a_coarse_wire_leaves_the_bases_alone():
    method, clients = made("ravan"), clients_of(2, 3, 5)
    state = begun(method, clients)
    handed = method.handout(state, clients[0], draw_of(1))
    there = wire.decode_download(wire.encode_download(handed, torch.bfloat16))
    fine = opened(method, state, clients[0], 1, shapes=SHAPES)
    start = method.receive(there, None, fresh(clients[0], 1, SHAPES))
    assert torch.equal(start.extra["bases"][Q].B, fine.extra["bases"][Q].B)
    assert start.adapter[Q].B.dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"heads": 30}, "30 heads of rank 0 do not stand side by side in 'model.q'"),
        ({"head_rank": 9}, r"4 heads of rank 9 .* in 'model.q' of shape \(41, 29\)"),
    ],
)
def test_heads_that_do_not_fit_are_refused(options, fault):
    with pytest.raises(ValueError, match=fault):
        begun(dataclasses.replace(made("ravan"), **options), clients_of(5))


@pytest.mark.parametrize("options", [{"heads": 0}, {"head_rank": 0}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match="at least 1"):
        made("ravan", **options)
