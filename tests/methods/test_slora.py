"""SLoRA: exact sparse means on a common mask, then LoRA from their SVD."""

import pytest
import torch

from flexlora import wire
from flexlora.errors import ConfigError
from flexlora.laws.dense import best, product, relative_error
from flexlora.laws.rounds import (
    EXAMPLES,
    SHAPES,
    after_rounds,
    aggregated,
    base_updates,
    client_turn,
    clients_of,
    context_of,
    first_state,
    noise,
    opened,
)
from flexlora.methods import make

DENSITY = 0.3
ENTRIES = {"model.q": 23, "model.up": 20}
"""0.3 of 77 and of 65 (19.5), rounded."""


def sparse(**options):
    return make("slora", {"rounds_sparse": 3, "density": DENSITY, **options})


def played(method, clients, rounds):
    return after_rounds(method, clients, rounds, lambda number: noise(method, number))


def turns_of(method, state, clients, number):
    context, learn = context_of(number, clients), noise(method, number)
    return [client_turn(method, state, c, context, learn) for c in clients]


def after(method, state, turns, clients):
    context = context_of(turns[0].upload.round, clients)
    return aggregated(method, state, [t.upload for t in turns], context)


def test_the_mask_is_common_random_and_of_its_density():
    method = sparse()
    clients = clients_of(method)
    state = played(method, clients, 1)
    masks = []
    for number in (2, 3):
        for done in turns_of(method, state, clients, number):
            masks.append({m: product(done.factors[m]) != 0 for m in SHAPES})
    for module, count in ENTRIES.items():
        assert all(torch.equal(mask[module], masks[0][module]) for mask in masks)
        assert int(masks[0][module].sum()) == count
        assert masks[0][module].any(0).all() or count < 25
    update = method.global_adapter(state, context_of(1, clients))
    assert all(torch.equal(product(update[m]) != 0, masks[0][m]) for m in SHAPES)


def test_the_start_is_no_update():
    method = sparse()
    clients = clients_of(method)
    state = first_state(method, clients)
    start = opened(method, state, clients[0], context_of(1, clients))
    update = method.global_adapter(state, context_of(0, clients))
    assert all(float(product(f).norm()) == 0 for f in start.adapter.values())
    assert all(float(product(f).norm()) == 0 for f in update.values())
    assert {m: f.shape for m, f in start.adapter.items()} == SHAPES


def test_the_first_stage_is_exact():
    method = sparse()
    clients = clients_of(method)
    state = played(method, clients, 1)
    turns = turns_of(method, state, clients, 2)
    new = after(method, state, turns, clients)
    got = method.global_adapter(new, context_of(2, clients))
    for module in SHAPES:
        want = sum(
            n / sum(EXAMPLES) * t.model()[module] for n, t in zip(EXAMPLES, turns, strict=True)
        )
        assert relative_error(product(got[module]), want) < 1e-12


def test_values_alone_travel_and_then_factors():
    method = sparse(rounds_sparse=1)
    clients = clients_of(method)
    state = first_state(method, clients)
    for number, numbers in ((1, sum(ENTRIES.values())), (2, 3 * 18 + 2 * 18)):
        turns = turns_of(method, state, clients, number)
        handed = method.handout(state, clients[0], context_of(number, clients))
        for data in (
            wire.encode_upload(turns[0].upload, torch.float32),
            wire.encode_download(handed, torch.float32),
        ):
            assert len(data) - 8 - int.from_bytes(data[:8], "little") == 4 * numbers
        state = after(method, state, turns, clients)


@pytest.mark.parametrize("remainder", ["drop", "merge"])
def test_the_switch_is_one_svd_with_balanced_factors(remainder):
    method = sparse(remainder=remainder)
    clients = clients_of(method)
    early = played(method, clients, 2)
    turns = turns_of(method, early, clients, 3)
    late = after(method, early, turns, clients)
    update = method.global_adapter(late, context_of(3, clients))
    start = opened(method, late, clients[0], context_of(4, clients))
    assert method.parametrize(start) is None and start.adapter.ranks == clients[0].ranks
    for module in SHAPES:
        want = sum(
            n / sum(EXAMPLES) * t.model()[module] for n, t in zip(EXAMPLES, turns, strict=True)
        )
        f = start.adapter[module]
        assert relative_error(product(f), best(want, f.rank)) < 1e-9
        torch.testing.assert_close(f.B.norm(dim=0), f.A.norm(dim=1))
        got = product(update[module])
        if remainder == "merge":
            seen = product(f) + sum(product(a[module]) for a in base_updates(late))
            assert relative_error(got, want) < 1e-9 and relative_error(seen, want) < 1e-9
        else:
            assert relative_error(got, best(want, f.rank)) < 1e-9 and not base_updates(late)
            lost = 1 - float(best(want, f.rank).norm() ** 2 / want.norm() ** 2)
            assert late.per_module["lost_energy"][module] == pytest.approx(lost)


def test_the_second_stage_is_plain_averaging_of_factors():
    method = sparse(rounds_sparse=1)
    clients = clients_of(method)
    state = played(method, clients, 1)
    assert state.per_module["lost_energy"].keys() == SHAPES.keys()
    turns = turns_of(method, state, clients, 2)
    new = after(method, state, turns, clients)
    for module in SHAPES:
        for name in ("B", "A"):
            want = sum(
                n / sum(EXAMPLES) * getattr(t.trained[module], name)
                for n, t in zip(EXAMPLES, turns, strict=True)
            )
            torch.testing.assert_close(getattr(new.model[module], name), want)
    assert new.per_module == {}


def test_what_is_merged_is_sent_once_and_to_late_clients_too():
    method = sparse(rounds_sparse=1, remainder="merge")
    clients = clients_of(method)
    state = first_state(method, clients)
    for number in (1, 2):
        first = turns_of(method, state, clients, number)[:1]
        assert list(first[0].start.base_updates) == ([1] if number == 2 else [])
        state = after(method, state, first, clients)
    context = context_of(3, clients)
    assert not method.handout(state, clients[0], context).base_updates
    assert list(method.handout(state, clients[1], context).base_updates) == [1]


def test_terms_that_an_svd_left_empty_start_afresh():
    """With two entries of up and of q each the SVD has two terms at most, and ranks are 3 and 2."""
    method = sparse(rounds_sparse=1, density=0.03)
    clients = clients_of(method)
    state = played(method, clients, 1)
    assert state.model["model.q"].rank == 2
    start = opened(method, state, clients[0], context_of(2, clients))
    assert start.adapter["model.q"].rank == 3
    assert float(start.adapter["model.q"].A[2].norm()) > 0
    assert float(start.adapter["model.q"].B[:, 2].norm()) == 0


@pytest.mark.parametrize("shape", [(11, 7), (5, 13)])
def test_the_one_hot_side_is_the_shorter_one_and_has_no_gradient(shape):
    method = sparse()
    shapes = {m: shape for m in SHAPES}
    clients = clients_of(method)
    state = first_state(method, clients, shapes)
    start = opened(method, state, clients[0], context_of(1, clients, shapes))
    parametrization = method.parametrize(start)["model.q"]
    f = parametrization.factors(torch.ones_like(parametrization.parameters).requires_grad_())
    short, long = (f.A, f.B) if shape[0] > shape[1] else (f.B, f.A)
    assert f.rank == min(shape) and long.requires_grad and not short.requires_grad
    assert torch.equal(short.sum(0), torch.ones(min(shape), dtype=short.dtype))
    assert int((product(f) == 1).sum()) == len(parametrization.parameters)


def test_entries_may_keep_to_a_share_of_the_columns():
    method = sparse(columns=0.5, density=0.3)
    clients = clients_of(method)
    start = opened(method, first_state(method, clients), clients[0], context_of(1, clients))
    for module, (out, in_) in SHAPES.items():
        f = method.parametrize(start)[module].factors(torch.ones(ENTRIES[module]))
        assert f.rank == (in_ + 1) // 2 and f.shape == (out, in_)
        assert int((product(f) == 1).sum()) == ENTRIES[module]


@pytest.mark.parametrize(
    "options",
    [{"rounds_sparse": 0}, {"density": 0.0}, {"density": 0.5, "columns": 0.4}, {"columns": 1.5}],
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ConfigError, match="0 < density <= columns <= 1, got"):
        make("slora", options)


def test_a_switch_whose_round_left_the_model_is_made_in_the_next():
    method = make("slora")
    clients = clients_of(method)
    first = after_rounds(method, clients, 1, lambda number: noise(method, number))
    later = after_rounds(method, clients, 1, lambda number: noise(method, number), first, first=3)
    assert all(f.shape[1] == 0 for f in first.model.values())
    assert all(f.shape == SHAPES[m] for m, f in later.model.items())
