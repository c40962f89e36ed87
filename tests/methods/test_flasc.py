import dataclasses
import math

import pytest
import torch

from flexlora import methods, wire
from flexlora.federation import checkpoint, rounds, setup
from flexlora.laws.dense import relative_error
from flexlora.laws.rounds import (
    SHAPES,
    after_rounds,
    aggregated,
    client_turn,
    clients_of,
    context_of,
    no_training,
    noise,
)
from flexlora.lowrank import Adapter
from flexlora.method import Feature
from flexlora.methods.flasc import FIRST, FLASC, SECOND, largest
from support import models
from support.factors import random_factors


def entries(adapter) -> torch.Tensor:
    return torch.cat([x.flatten() for f in adapter.values() for x in (f.B, f.A)])


def adapter(seed=1) -> Adapter:
    return Adapter(
        {m: random_factors(*s[:1], 3, s[1], seed + i) for i, (m, s) in enumerate(SHAPES.items())}
    )


def dense(**options) -> FLASC:
    return FLASC(density_down=1.0, density_up=1.0, **options)


def played(method, clients, rounds):
    return after_rounds(method, clients, rounds, lambda number: noise(method, number))


def turns_of(method, state, clients, number, learn=None):
    context, learn = context_of(number, clients), learn or noise(method, number)
    return [client_turn(method, state, c, context, learn) for c in clients]


def after(method, state, turns, clients, number):
    return aggregated(method, state, [t.upload for t in turns], context_of(number, clients))


@pytest.mark.parametrize("density", [0.1, 0.25, 0.9])
def test_the_largest_entries_are_kept_by_one_threshold_and_as_they_are(density):
    whole = adapter()
    got, all_ = entries(largest(whole, density)), entries(whole)
    count = math.ceil(density * len(all_))
    want = all_.abs().argsort(descending=True)[:count]
    assert set(got.nonzero().flatten().tolist()) == set(want.tolist())
    assert torch.equal(got[want], all_[want])
    assert largest(whole, 1.0) is whole


def test_large_modules_take_the_share_of_small_ones():
    whole = adapter()
    module = next(iter(SHAPES))
    f = whole[module]
    shares = Adapter({**whole, module: type(f)(f.B * 1000, f.A * 1000)})
    numbers = f.B.numel() + f.A.numel()
    cut = largest(shares, numbers / whole.parameters)
    assert all(not (cut[m].B != 0).any() for m in SHAPES if m != module)
    assert bool((cut[module].B != 0).all() and (cut[module].A != 0).all())


def test_everything_and_a_rate_of_one_is_fedit():
    """Oracle 14 of the methods' reference: over three rounds, from the same start."""
    fedit = methods.make("fedit")
    clients = clients_of(fedit)
    got, want = (played(method, clients, 3).model for method in (dense(), fedit))
    for module, f in want.items():
        assert relative_error(got[module].B, f.B) < 1e-12
        assert relative_error(got[module].A, f.A) < 1e-12
    sparse = played(FLASC(), clients, 3).model
    assert all(relative_error(sparse[m].B, want[m].B) > 0.1 for m in SHAPES)


def test_a_client_starts_from_zeros_and_its_change_is_from_there():
    """What it was not handed is no change, and is not lost to the server."""
    method = FLASC(density_up=1.0)
    clients = clients_of(method)
    state = played(method, clients, 1)
    turns = turns_of(method, state, clients, 2, no_training)
    assert all(not entries(t.upload.adapter).any() for t in turns)
    new = after(method, state, turns, clients, 2)
    assert torch.equal(entries(new.model), entries(state.model))
    start = entries(turns[0].start.adapter)
    assert (start == 0).float().mean() > 0.7


def test_every_entry_may_be_sent_that_was_handed_out_as_zero():
    method = FLASC(density_down=0.1, density_up=0.3)
    clients = clients_of(method)
    t = turns_of(method, played(method, clients, 1), clients, 2)[0]
    sent, start = entries(t.upload.adapter), entries(t.start.adapter)
    assert (sent != 0).sum() == math.ceil(0.3 * len(sent))
    assert bool((sent[start == 0] != 0).any())


@pytest.mark.parametrize("betas", [(0.9, 0.99), (0.0, 0.5)])
def test_adam_is_the_papers_recursion_entry_by_entry(betas):
    method = dense(optimizer="adam", rate=0.3, betas=betas, tau=0.05)
    clients = clients_of(method)
    state = after_rounds(method, clients, 1, lambda number: no_training)
    x = entries(state.model)
    m, v = torch.zeros_like(x), torch.full_like(x, 0.05**2)
    total = sum(c.examples for c in clients)
    v = betas[1] * v  # the round in which nobody learnt anything
    for number in (2, 3, 4):
        turns = turns_of(method, state, clients, number)
        mean = sum(t.client.examples / total * entries(t.upload.adapter) for t in turns)
        m = betas[0] * m + (1 - betas[0]) * mean
        v = betas[1] * v + (1 - betas[1]) * mean**2
        x = x + 0.3 * m / (v.sqrt() + 0.05)
        state = after(method, state, turns, clients, number)
    assert relative_error(entries(state.model)[None], x[None]) < 1e-12
    assert relative_error(entries(state.memory[FIRST])[None], m[None]) < 1e-12
    assert relative_error(entries(state.memory[SECOND])[None], v[None]) < 1e-12


def test_rates_that_are_not_given_are_the_papers():
    clients = clients_of(FLASC())
    for name, rate in (("sgd", 1.0), ("adam", 0.005)):
        default = played(dense(optimizer=name), clients, 2)
        given = played(dense(optimizer=name, rate=rate), clients, 2)
        assert torch.equal(entries(default.model), entries(given.model))


def test_moments_survive_a_checkpoint(tmp_path):
    method = FLASC(optimizer="adam")
    clients = clients_of(method)
    state = played(method, clients, 2)
    state = dataclasses.replace(
        state,
        model=state.model.to(torch.float32),
        memory={name: a.to(torch.float32) for name, a in state.memory.items()},
    )
    loaded = checkpoint.save(tmp_path, 2, 0, state).state
    turns = turns_of(method, state, clients, 3)
    got, want = (after(method, s, turns, clients, 3) for s in (loaded, state))
    assert torch.equal(entries(got.model), entries(want.model))
    for name in (FIRST, SECOND):
        assert torch.equal(entries(got.memory[name]), entries(want.memory[name]))


def test_sparse_messages_are_smaller_and_what_they_hold_is_the_same():
    method = FLASC(density_down=0.1, density_up=0.1)
    shapes = {"model.q": (176, 112), "model.up": (208, 80)}
    clients = [dataclasses.replace(c, ranks=dict.fromkeys(shapes, 5)) for c in clients_of(method)]
    whole = Adapter(
        {
            m: random_factors(s[0], 5, s[1], i, torch.float32)
            for i, (m, s) in enumerate(shapes.items())
        }
    )
    state = method.start(whole, context_of(0, clients, shapes))
    handed = method.handout(state, clients[0], context_of(1, clients, shapes))
    dense_, sparse = (wire.encode_download(handed, torch.float32, how) for how in (False, True))
    # A tenth of the numbers and a 32nd for the mask: 0.13, and what the header says.
    assert len(sparse) < 0.28 * len(dense_)
    back = wire.decode_download(sparse).adapter
    assert torch.equal(entries(back), entries({m: handed.adapter[m] for m in back}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density_down": 0.0}, r"density_down is a share in \(0, 1\], got 0.0"),
        ({"density_up": 1.5}, "density_up is a share"),
        ({"rate": 0.0}, "rate is finite and above 0"),
        ({"tau": math.inf}, "tau is finite and above 0"),
        ({"betas": (0.9, 1.0)}, r"betas lie in \[0, 1\)"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        FLASC(**options)


def test_it_is_made_from_a_config():
    flasc = methods.make("flasc", {"optimizer": "adam", "betas": [0.8, 0.9], "density_up": 0.5})
    assert flasc == FLASC(optimizer="adam", betas=(0.8, 0.9), density_up=0.5)
    assert Feature.SAME_FOR_EQUAL_RANKS in flasc.features


def test_a_run_learns_with_fewer_bytes_both_ways(tmp_path):
    """Through rounds, clients and files; downloads are made once for all."""
    models.save(tmp_path / "model")
    totals = {}
    for name in ("flasc", "fedit"):
        settings = models.settings(
            tmp_path,
            method={"name": name},
            ranks={"rank": 3, "types": None, "distribution": None},
            training={"epochs": 2},
            evaluation={"seen_clients": 0},
        )
        prepared = setup.prepare(settings, models.corpus())
        events = list(rounds.run(prepared, tmp_path / name))
        totals[name] = [event for event in events if event["event"] == "round"]
        handed = [event for event in events if event["event"] == "client"]
        assert len({(event["round"], event["bytes_down"]) for event in handed}) == 3
    for flasc, fedit in zip(totals["flasc"], totals["fedit"], strict=True):
        # A quarter of the numbers, a bit for each, and headers, large beside so small modules.
        assert flasc["bytes_down"] < 0.6 * fedit["bytes_down"]
        assert flasc["bytes_up"] < 0.6 * fedit["bytes_up"]
    losses = [event["loss_total"] / event["loss_tokens"] for event in totals["flasc"]]
    assert losses[-1] < 0.9 * losses[0]
