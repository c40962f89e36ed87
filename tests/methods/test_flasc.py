import dataclasses
import math

import pytest
import torch

from flexlora import methods, wire
from flexlora.federation import checkpoint, rounds, setup
from flexlora.lowrank.factors import Adapter
from flexlora.methods.flasc import FIRST, FLASC, SECOND, largest
from support import models
from support.factors import random_factors
from support.oracle import relative_error
from support.rounds import SHAPES, clients_of, draw_of, jolt, made, played, turn


def entries(adapter) -> torch.Tensor:
    return torch.cat([x.flatten() for f in adapter.values() for x in (f.B, f.A)])


def adapter(seed=1) -> Adapter:
    return Adapter(
        {m: random_factors(*s[:1], 3, s[1], seed + i) for i, (m, s) in enumerate(SHAPES.items())}
    )


def dense(**options) -> FLASC:
    return FLASC(density_down=1.0, density_up=1.0, **options)


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
    fedit = made("fedit")
    clients = clients_of(fedit)
    got, want = (played(method, clients, 3, jolt) for method in (dense(), fedit))
    for module, f in want.adapters["global"].items():
        assert relative_error(got.adapters["global"][module].B, f.B) < 1e-12
        assert relative_error(got.adapters["global"][module].A, f.A) < 1e-12
    sparse = played(FLASC(), clients, 3, jolt).adapters["global"]
    assert all(relative_error(sparse[m].B, want.adapters["global"][m].B) > 0.1 for m in SHAPES)


def test_a_client_starts_from_zeros_and_its_change_is_from_there():
    """What it was not handed is no change, and is not lost to the server."""
    method = FLASC(density_up=1.0)
    clients = clients_of(method)
    state = played(method, clients, 1, jolt)
    still = [turn(method, state, c, 2, lambda client, start: start.adapter) for c in clients]
    assert all(not entries(t.upload.adapter).any() for t in still)
    after = method.aggregate(state, [t.upload for t in still])
    assert torch.equal(entries(after.adapters["global"]), entries(state.adapters["global"]))
    start = entries(still[0].start.adapter)
    assert (start == 0).float().mean() > 0.7


def test_every_entry_may_be_sent_that_was_handed_out_as_zero():
    method = FLASC(density_down=0.1, density_up=0.3)
    clients = clients_of(method)
    state = played(method, clients, 1, jolt)
    t = turn(method, state, clients[0], 2, jolt(2))
    sent, start = entries(t.upload.adapter), entries(t.start.adapter)
    assert (sent != 0).sum() == math.ceil(0.3 * len(sent))
    assert bool((sent[start == 0] != 0).any())


@pytest.mark.parametrize("betas", [(0.9, 0.99), (0.0, 0.5)])
def test_adam_is_the_papers_recursion_entry_by_entry(betas):
    method = dense(optimizer="adam", rate=0.3, betas=betas, tau=0.05)
    clients = clients_of(method)
    state = played(method, clients, 1, lambda n: lambda client, start: start.adapter)
    x = entries(state.adapters["global"])
    m, v = torch.zeros_like(x), torch.full_like(x, 0.05**2)
    total = sum(c.examples for c in clients)
    v = betas[1] * v  # the round in which nobody learnt anything
    for number in (2, 3, 4):
        turns = [turn(method, state, c, number, jolt(number)) for c in clients]
        mean = sum(t.client.examples / total * entries(t.upload.adapter) for t in turns)
        m = betas[0] * m + (1 - betas[0]) * mean
        v = betas[1] * v + (1 - betas[1]) * mean**2
        x = x + 0.3 * m / (v.sqrt() + 0.05)
        state = method.aggregate(state, [t.upload for t in turns])
    assert relative_error(entries(state.adapters["global"])[None], x[None]) < 1e-12
    assert relative_error(entries(state.adapters[FIRST])[None], m[None]) < 1e-12
    assert relative_error(entries(state.adapters[SECOND])[None], v[None]) < 1e-12


def test_rates_that_are_not_given_are_the_papers():
    clients = clients_of(FLASC())
    for name, rate in (("sgd", 1.0), ("adam", 0.005)):
        known = played(dense(optimizer=name), clients, 2, jolt)
        given = played(dense(optimizer=name, rate=rate), clients, 2, jolt)
        assert torch.equal(entries(known.adapters["global"]), entries(given.adapters["global"]))


def test_moments_survive_a_checkpoint(tmp_path):
    method = FLASC(optimizer="adam")
    clients = clients_of(method)
    state = played(method, clients, 2, jolt)
    state = dataclasses.replace(
        state, adapters={k: a.to(torch.float32) for k, a in state.adapters.items()}
    )
    loaded = checkpoint.save(tmp_path, 2, 0, state).state
    uploads = [turn(method, state, c, 3, jolt(3)).upload for c in clients]
    got, want = (method.aggregate(s, uploads) for s in (loaded, state))
    for name in ("global", FIRST, SECOND):
        assert torch.equal(entries(got.adapters[name]), entries(want.adapters[name]))


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
    handed = method.handout(method.start(whole), clients[0], draw_of(1))
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
    found = methods.make("flasc", {"optimizer": "adam", "betas": [0.8, 0.9], "density_up": 0.5})
    assert found == FLASC(optimizer="adam", betas=(0.8, 0.9), density_up=0.5)
    assert found.by_rank_alone


def test_a_run_learns_with_fewer_bytes_both_ways(tmp_path):
    """Through rounds, clients and files; downloads are made once for all."""
    models.save(tmp_path / "model")
    totals = {}
    for name in ("flasc", "fedit"):
        how = models.settings(
            tmp_path,
            method={"name": name},
            ranks={"rank": 3, "types": None, "distribution": None},
            training={"epochs": 2},
            evaluation={"seen_clients": 0},
        )
        ready = setup.prepare(how, models.corpus())
        events = list(rounds.run(ready, tmp_path / name))
        totals[name] = [event for event in events if event["event"] == "round"]
        handed = [event for event in events if event["event"] == "client"]
        assert len({(event["round"], event["bytes_down"]) for event in handed}) == 3
    for flasc, fedit in zip(totals["flasc"], totals["fedit"], strict=True):
        # A quarter of the numbers, a bit for each, and headers, large beside so small modules.
        assert flasc["bytes_down"] < 0.6 * fedit["bytes_down"]
        assert flasc["bytes_up"] < 0.6 * fedit["bytes_up"]
    losses = [event["loss_total"] / event["loss_tokens"] for event in totals["flasc"]]
    assert losses[-1] < 0.9 * losses[0]
