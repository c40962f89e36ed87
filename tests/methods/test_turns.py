"""Every method: clients trained together send what each alone would have sent."""

import dataclasses

import pytest
import torch

from flexlora import methods, wire
from flexlora.federation import client_turn, setup
from flexlora.federation.client_store import ClientStore
from flexlora.federation.client_turn import TurnRequest
from flexlora.seeds import rng
from support import models


@pytest.fixture(scope="module", params=methods.names())
def ready(request, tmp_path_factory):
    """A federation of this method, of mixed ranks where it takes them."""
    folder = tmp_path_factory.mktemp("tiny")
    models.save(folder / "model")
    changes = {"method": {"name": request.param}}
    if not methods.make(request.param).mixed_ranks:
        same = {"all": {"attention": 3, "feed_forward": 3}}
        changes["ranks"] = {"types": same, "distribution": {"all": 1.0}}
    return setup.prepare(models.settings(folder, **changes), models.corpus())


@pytest.fixture(scope="module")
def jobs(ready):
    """All clients in round 2, from one global state; they differ in rows, and in ranks."""
    state = ready.method.start(ready.fresh())
    handed = {
        name: ready.method.handout(state, who, lambda m, name=name: rng(1, name, m))
        for name, who in ready.clients.items()
    }
    return [
        TurnRequest(name, 2, wire.encode_download(download, torch.float32))
        for name, download in handed.items()
    ]


def opened(data: bytes, path):
    path.write_bytes(data)
    return wire.open_upload(path)


@pytest.mark.parametrize("tokens", [24, 1000])
def test_turns_together_are_the_turns(ready, jobs, tokens, tmp_path):
    """By SGD: what AdamW makes of a gradient that is all but zero, rounding decides."""
    training = dataclasses.replace(
        ready.workplace.training, optimizer="sgd", learning_rate=0.1, pack_tokens=tokens
    )
    here = dataclasses.replace(
        ready.workplace, training=training, private=ClientStore(tmp_path / "private")
    )
    together = client_turn.turns(jobs, here)
    assert len({who.examples for who in ready.clients.values()}) > 1
    assert (len({str(who.ranks) for who in ready.clients.values()}) > 1) == (
        ready.method.mixed_ranks
    )
    for job, data in zip(jobs, together, strict=True):
        got = opened(data, tmp_path / f"{job.client}-together")
        want = opened(client_turn.turn(job, here), tmp_path / f"{job.client}-alone")
        assert (got.client, got.round, got.examples) == (want.client, want.round, want.examples)
        assert got.client == job.client
        assert got.adapter.ranks == want.adapter.ranks and got.terms == want.terms
        for module, factors in want.adapter.items():
            for half in ("B", "A"):
                mine, alone = getattr(got.adapter[module], half), getattr(factors, half)
                # Changes are differences of float32 numbers, and so rounded as those are.
                rounding = 1e-7 * alone.numel() ** 0.5
                assert (mine - alone).norm() <= 1e-5 * alone.norm() + rounding
        # With B of zero the start is no update: what is sent is what was learnt.
        assert sum(float(f.B.norm() + f.A.norm()) for f in want.adapter.values()) > 0
        same = ("tokens", "computed", "steps", "loss_tokens", "bytes_down")
        assert {n: got.facts[n] for n in same} == {n: want.facts[n] for n in same}
        assert got.facts["loss_total"] == pytest.approx(want.facts["loss_total"], rel=1e-5)
