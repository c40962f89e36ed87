import dataclasses
import math

import pytest
import torch

from flexlora import methods, wire
from flexlora.federation import client_turn, setup
from flexlora.federation.client_turn import TurnRequest
from flexlora.laws.dense import product, relative_error
from flexlora.lowrank.factors import Adapter, Factors
from flexlora.method.handout import with_components
from flexlora.method.interface import Download
from flexlora.seeds import rng
from flexlora.training.loop import ClientTask
from support import models
from support.factors import random_adapter
from support.learning import train
from support.rounding import rounding


@pytest.fixture(scope="module")
def ready(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    models.save(folder / "model")
    return setup.prepare(models.settings(folder), models.corpus())


@pytest.fixture(scope="module")
def job(ready):
    start = ready.method.start(ready.fresh(), ready.context(0))
    handed = ready.method.handout(start, ready.clients["client4"], ready.context(1))
    return TurnRequest("client4", 2, wire.encode_download(handed, torch.float32))


def opened(data: bytes, tmp_path):
    """The upload, copied: what is read from a file changes when the file is written again."""
    path = tmp_path / "upload"
    path.write_bytes(data)
    upload = wire.open_upload(path)
    copies = {m: Factors(f.B.clone(), f.A.clone()) for m, f in upload.adapter.items()}
    return dataclasses.replace(upload, adapter=Adapter(copies))


def test_a_turn_trains_the_download_on_the_clients_own_rows(ready, job, tmp_path):
    here = ready.runtime
    upload = opened(client_turn.turn(job, here), tmp_path)
    want = train(
        here.base,
        ClientTask(
            "client 'client4'",
            wire.decode_download(job.download).adapter,
            here.rows["client4"],
            rng(here.seed, "client", "client4", 2),
        ),
        here.store,
        here.training,
        2,
    )
    assert (upload.client, upload.round, upload.examples) == ("client4", 2, 12)
    assert upload.adapter.ranks == ready.clients["client4"].ranks
    for module, factors in want.adapter.items():
        assert torch.equal(upload.adapter[module].B, factors.B)
        assert torch.equal(upload.adapter[module].A, factors.A)
    assert upload.metrics["steps"] == want.steps == 3
    assert upload.metrics["tokens"] == want.tokens
    assert upload.metrics["computed"] == want.computed
    assert set(upload.metrics) == set(client_turn.METRICS)
    assert upload.metrics["loss_total"] == want.loss_total
    assert upload.metrics["loss_tokens"] == want.loss_tokens
    assert upload.metrics["bytes_down"] == len(job.download)
    assert upload.metrics["seconds"] > 0


def test_seed_client_and_round_decide_and_nothing_else(ready, job, tmp_path):
    def result(job=job, here=ready.runtime):
        adapter = opened(client_turn.turn(job, here), tmp_path).adapter
        return torch.cat([f.A.flatten() for f in adapter.values()])

    once = result()
    result(TurnRequest("client1", 2, job.download))
    assert torch.equal(result(), once)
    for other in (
        {"job": dataclasses.replace(job, round=3)},
        {"here": dataclasses.replace(ready.runtime, seed=4)},
    ):
        assert not torch.equal(result(**other), once)


def test_the_upload_has_the_numbers_of_the_wire(ready, job, tmp_path):
    here = dataclasses.replace(ready.runtime, wire_dtype=torch.bfloat16)
    coarse = opened(client_turn.turn(job, here), tmp_path).adapter
    fine = opened(client_turn.turn(job, ready.runtime), tmp_path).adapter
    for module, factors in fine.items():
        assert coarse[module].B.dtype == torch.bfloat16
        assert torch.equal(coarse[module].A, factors.A.to(torch.bfloat16))


def test_a_coarse_download_is_trained_in_single_precision(ready, job, tmp_path):
    adapter = wire.decode_download(job.download).adapter
    coarse = TurnRequest("client4", 2, wire.encode_download(Download(adapter), torch.bfloat16))
    upload = opened(client_turn.turn(coarse, ready.runtime), tmp_path)
    assert {f.B.dtype for f in upload.adapter.values()} == {torch.float32}


def test_the_methods_client_half_is_asked(ready, job, tmp_path):
    """HetLoRA's penalty enters the training, and what it prunes is not sent."""
    plain = opened(client_turn.turn(job, ready.runtime), tmp_path).adapter
    here = dataclasses.replace(
        ready.runtime, method=methods.make("hetlora", {"keep": 0.6, "decay": 5.0})
    )
    first = opened(client_turn.turn(job, here), tmp_path).adapter
    assert first.ranks == plain.ranks  # the tail of a fresh start is zero: it can only grow
    module = "model.layers.0.mlp.up_proj"
    assert relative_error(product(first[module]), product(plain[module])) > 1e-3
    again = TurnRequest("client4", 3, wire.encode_download(Download(plain), torch.float32))
    pruned = opened(client_turn.turn(again, here), tmp_path).adapter
    assert set(pruned.ranks.values()) == {1, 3}


def test_what_is_no_download_is_refused(ready):
    with pytest.raises(ValueError, match="is not a valid safetensors file"):
        client_turn.turn(TurnRequest("client4", 2, b"noise"), ready.runtime)


def test_clients_train_together_in_one_round_only(ready, job):
    later = dataclasses.replace(job, round=3)
    with pytest.raises(ValueError, match=r"in one round, not in \[2, 3\]"):
        client_turn.turns([job, later], ready.runtime)


def test_who_breaks_a_turn_is_named(ready, job):
    """Its loss is not finite; the others' are."""
    broken = wire.decode_download(job.download).adapter
    broken["model.layers.0.mlp.down_proj"].B[0, 0] = math.nan
    data = wire.encode_download(Download(broken), torch.float32)
    jobs = [dataclasses.replace(job, client="client1"), TurnRequest("client3", 2, data), job]
    with pytest.raises(ValueError, match="loss of client 'client3' is nan"):
        client_turn.turns(jobs, ready.runtime)


def test_a_download_may_be_a_file(ready, job, tmp_path):
    path = tmp_path / "download"
    path.write_bytes(job.download)
    held = TurnRequest("client4", 2, path)
    assert held.bytes_down == job.bytes_down == len(job.download)
    got, want = (opened(client_turn.turn(each, ready.runtime), tmp_path) for each in (held, job))
    for module, factors in want.adapter.items():
        assert torch.equal(got.adapter[module].B, factors.B)
        assert torch.equal(got.adapter[module].A, factors.A)


def sgd(ready, **changes):
    training = dataclasses.replace(
        ready.runtime.training, optimizer="sgd", learning_rate=0.05, clip_norm=1e6, **changes
    )
    return dataclasses.replace(ready.runtime, training=training)


def sent(download, here, tmp_path):
    data = wire.encode_download(download, torch.float32)
    return opened(client_turn.turn(TurnRequest("client4", 2, data), here), tmp_path).adapter


def test_the_rest_of_a_download_is_seen_as_if_it_were_in_the_base(ready, job, tmp_path):
    here = sgd(ready)
    adapter = wire.decode_download(job.download).adapter
    rest = random_adapter(ready.base.shapes, 4, 50)
    beside = sent(Download(adapter, rest), here, tmp_path)
    with ready.base.folded([rest]):
        inside = sent(Download(adapter), here, tmp_path)
    without = sent(Download(adapter), here, tmp_path)

    def distance(got, want):
        return max(float((got[m].B - want[m].B).norm() / want[m].B.norm()) for m in want)

    assert distance(inside, beside) < rounding(
        ready.base.model, lambda: sent(Download(adapter, rest), here, tmp_path), beside, distance
    )
    assert any((f.B - without[m].B).norm() > 1e-2 * f.B.norm() for m, f in beside.items())


def test_a_factor_multiplies_the_learning_rate(ready, job, tmp_path):
    here = sgd(ready, max_steps=1)
    adapter = wire.decode_download(job.download).adapter
    once, fivefold = (
        sent(Download(adapter, factors="B", learning_rate_factor=rate), here, tmp_path)
        for rate in (1.0, 5.0)
    )
    for module, f in once.items():
        assert torch.equal(f.A, adapter[module].A)
        moved = [x[module].B - adapter[module].B for x in (once, fivefold)]
        assert float(moved[0].norm()) > 0
        assert torch.allclose(moved[1], 5 * moved[0], rtol=1e-4, atol=1e-7)


def test_numbered_components_have_the_scale_of_the_whole_adapter(ready, tmp_path):
    """With a scale of alpha / rank a term moves as far, however many others are trained."""
    here = sgd(ready, max_steps=1, scaling="rank")
    whole = random_adapter(ready.base.shapes, 4, 60)
    few = with_components(Download(whole), {m: (2,) for m in whole})
    all_of_them = with_components(Download(whole), {m: (0, 1, 2, 3) for m in whole})

    def moved(download):
        """How far the third term's column of B goes, by module."""
        adapter = sent(download, here, tmp_path)
        place = {m: f.rank // 2 for m, f in adapter.items()}  # 0 of one term, 2 of four
        return {m: f.B[:, place[m]] - whole[m].B[:, 2] for m, f in adapter.items()}

    def distance(got, want):
        return max(float((got[m] - want[m]).norm() / want[m].norm()) for m in want)

    one, four = moved(few), moved(all_of_them)
    assert distance(four, one) < rounding(ready.base.model, lambda: moved(few), one, distance)
