"""Every method: clients trained together send what each alone would have sent."""

import dataclasses

import pytest
import torch

from flexlora import methods, wire
from flexlora.federation import client_turn, setup
from flexlora.federation.client_store import ClientStore
from flexlora.federation.client_turn import TurnRequest
from flexlora.method import Feature
from support import models


@pytest.fixture(scope="module", params=methods.names())
def prepared(request, tmp_path_factory):
    """A federation of this method, of mixed ranks where it takes them."""
    folder = tmp_path_factory.mktemp("tiny")
    models.save(folder / "model")
    changes = {"method": {"name": request.param}}
    if Feature.MIXED_RANKS not in methods.make(request.param).features:
        same = {"all": {"attention": 3, "feed_forward": 3}}
        changes["ranks"] = {"types": same, "distribution": {"all": 1.0}}
    return setup.prepare(models.settings(folder, **changes), models.corpus())


@pytest.fixture(scope="module")
def requests(prepared):
    """All clients in round 1, from one global state; they differ in rows, and in ranks."""
    context = prepared.context(1)
    state = prepared.method.start(prepared.fresh(), prepared.context(0))
    return [
        TurnRequest(
            name,
            1,
            wire.encode_download(prepared.method.handout(state, client, context), torch.float32),
        )
        for name, client in prepared.clients.items()
    ]


def opened(data: bytes, path):
    path.write_bytes(data)
    return wire.open_upload(path)


@pytest.mark.parametrize("tokens", [24, 1000])
def test_turns_together_are_the_turns(prepared, requests, tokens, tmp_path):
    """By SGD: what AdamW makes of a gradient that is all but zero, rounding decides."""
    training = dataclasses.replace(
        prepared.runtime.training, optimizer="sgd", learning_rate=0.1, pack_tokens=tokens
    )
    runtime = dataclasses.replace(
        prepared.runtime, training=training, clients=ClientStore(tmp_path / "private")
    )
    together = client_turn.turns(requests, runtime)
    clients = list(prepared.clients.values())
    assert len({client.examples for client in clients}) > 1
    mixed = Feature.MIXED_RANKS in prepared.method.features
    assert (len({str(client.ranks) for client in clients}) > 1) == mixed
    for request, data in zip(requests, together, strict=True):
        got = opened(data, tmp_path / f"{request.client}-together")
        want = opened(client_turn.turn(request, runtime), tmp_path / f"{request.client}-single")
        assert (got.client, got.round, got.examples) == (want.client, want.round, want.examples)
        assert got.client == request.client
        assert got.adapter.ranks == want.adapter.ranks
        assert got.component_ids == want.component_ids and got.aux.keys() == want.aux.keys()
        for module, factors in want.adapter.items():
            for name in ("B", "A"):
                trained, expected = getattr(got.adapter[module], name), getattr(factors, name)
                # Changes are differences of float32 numbers, and so rounded as those are.
                rounding = 1e-7 * expected.numel() ** 0.5
                assert (trained - expected).norm() <= 1e-5 * expected.norm() + rounding
        # With B of zero the start is no update: what is sent is what was learnt.
        assert sum(float(f.B.norm() + f.A.norm()) for f in want.adapter.values()) > 0
        same = ("tokens", "computed", "steps", "loss_tokens", "bytes_down")
        assert {n: got.metrics[n] for n in same} == {n: want.metrics[n] for n in same}
        assert got.metrics["loss_total"] == pytest.approx(want.metrics["loss_total"], rel=1e-5)
