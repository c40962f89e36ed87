"""Every method in whole runs: it trains, it resumes to the bit, and its loss falls."""

import dataclasses

import pytest
import torch

from flexlora import methods, peft_format
from flexlora.federation import rounds, setup
from flexlora.journal.record import Record
from flexlora.method import Feature
from flexlora.model.base import Base
from support import models


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    models.save(folder / "model")
    return folder


@pytest.fixture(scope="module")
def base(folder) -> Base:
    return models.settings(folder).model.load()


def prepared(folder, base, name, number):
    changes = {
        "method": {"name": name},
        "federation": {"rounds": number, "cohort": 3},
        "evaluation": {"base": False, "truncated": False, "seen_clients": 1},
        "training": {"scaling": "none", "alpha": 2.0},
    }
    if Feature.MIXED_RANKS not in methods.make(name).features:
        same = {"all": {"attention": 3, "feed_forward": 3}}
        changes["ranks"] = {"types": same, "distribution": {"all": 1.0}}
    return setup.prepare(models.settings(folder, **changes), models.corpus(), base=base)


@pytest.mark.parametrize("name", methods.names())
def test_a_resumed_run_is_the_run(name, folder, base, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    list(rounds.run(prepared(folder, base, name, 3), whole))
    list(rounds.run(prepared(folder, base, name, 2), parts))
    before = {path: W.detach().clone() for path, W in base.model.state_dict().items()}
    list(rounds.run(prepared(folder, base, name, 3), parts, resume=True))
    assert all(torch.equal(W, before[path]) for path, W in base.model.state_dict().items())
    ends = [peft_format.read(rounds.adapter_folder(where, 3)).adapter for where in (whole, parts)]
    for module, f in ends[0].items():
        assert torch.equal(f.B, ends[1][module].B) and torch.equal(f.A, ends[1][module].A)
    turns = [list(Record(where).events("client")) for where in (whole, parts)]
    for event in (*turns[0], *turns[1]):
        del event["seconds"], event["time"]
    assert turns[0] == turns[1] and len(turns[0]) == 9
    losses = [e["loss_total"] / e["loss_tokens"] for e in Record(whole).events("round")]
    assert losses[-1] < losses[0]
    assert [e["adapter"] for e in Record(whole).events("evaluation")][-1]


def test_a_base_that_cannot_merge_sees_merged_updates_beside_it(folder, tmp_path, monkeypatch):
    """In float32 both ways are the same training."""
    adapters = []
    for folds in (True, False):
        base = models.settings(folder).model.load()
        monkeypatch.setattr(Base, "folds", property(lambda self, folds=folds: folds))
        run = prepared(folder, base, "flora", 3)
        sgd = dataclasses.replace(run.runtime.training, optimizer="sgd", learning_rate=0.1)
        list(rounds.run(run.with_runtime(training=sgd), tmp_path / str(folds)))
        adapters.append(peft_format.read(rounds.adapter_folder(tmp_path / str(folds), 3)).adapter)
    for module, f in adapters[0].items():
        error = (f.B @ f.A - adapters[1][module].B @ adapters[1][module].A).norm()
        assert error < 1e-4 * (f.B @ f.A).norm()
