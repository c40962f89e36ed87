import json
import os

import pytest
import torch

from flexlora.federation import checkpoint
from flexlora.lowrank.factors import Adapter
from flexlora.method.interface import State
from support.factors import random_factors


def state(seed: int) -> State:
    return State(
        {
            "global": Adapter(
                {
                    "model.up": random_factors(13, 2, 5, seed, torch.float32),
                    "model.q": random_factors(11, 3, 7, seed + 1, torch.float32),
                }
            ),
            "momentum": Adapter({"model.q": random_factors(11, 1, 7, seed + 2, torch.float32)}),
        },
        {"ranks": {"model.up": 2, "model.q": 3}, "seed": seed},
    )


def assert_same(got: State, want: State) -> None:
    assert got.facts == want.facts
    assert list(got.facts["ranks"]) == list(want.facts["ranks"])
    assert set(got.adapters) == set(want.adapters)
    for name, adapter in want.adapters.items():
        assert set(got.adapters[name]) == set(adapter)
        for module, factors in adapter.items():
            assert torch.equal(got.adapters[name][module].B, factors.B)
            assert torch.equal(got.adapters[name][module].A, factors.A)


def test_a_state_comes_back_to_the_bit(tmp_path):
    saved = checkpoint.save(tmp_path, 3, 1234, state(1))
    for found in (saved, checkpoint.load(tmp_path)):
        assert (found.round, found.journal_bytes) == (3, 1234)
        assert_same(found.state, state(1))


def test_only_the_last_one_is_kept(tmp_path):
    for round in range(3):
        checkpoint.save(tmp_path, round, 10 * round, state(round))
    assert_same(checkpoint.load(tmp_path).state, state(2))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.json", "state-00002"]


def test_a_state_read_from_the_one_before_may_be_saved(tmp_path):
    """Nothing of the old state is deleted before it has been copied."""
    first = checkpoint.save(tmp_path, 0, 0, state(1))
    assert_same(checkpoint.save(tmp_path, 1, 5, first.state).state, state(1))


class Died(BaseException):
    pass


@pytest.mark.parametrize("operation", ["mkdir", "open", "rename", "replace"])
def test_dying_at_any_operation_leaves_the_old_or_the_new(tmp_path, monkeypatch, operation):
    """And the next attempt succeeds over whatever was left behind."""
    path_type = type(tmp_path)
    whole = getattr(path_type, operation)
    for count in range(20):
        folder = tmp_path / str(count)
        checkpoint.save(folder, 1, 10, state(1))
        calls = []

        def mortal(*arguments, at=count, calls=calls, **options):
            calls.append(1)
            if len(calls) > at:
                raise Died
            return whole(*arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(path_type, operation, mortal)
            try:
                checkpoint.save(folder, 2, 20, state(2))
            except Died:
                pass
            else:
                break
        found = checkpoint.load(folder)
        assert (found.round, found.journal_bytes) in ((1, 10), (2, 20))
        assert_same(found.state, state(found.round))
        assert_same(checkpoint.save(folder, 2, 20, state(2)).state, state(2))
        assert sorted(os.listdir(folder)) == ["checkpoint.json", "state-00002"]
    assert 0 < count < 19


def test_nothing_to_resume_is_said(tmp_path):
    with pytest.raises(ValueError, match=r"no run to resume in .*checkpoint\.json is missing"):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / checkpoint.POINTER).write_text("{"),
        lambda folder: (folder / checkpoint.POINTER).write_text("[]"),
        lambda folder: (folder / checkpoint.POINTER).write_text(json.dumps({"round": 1})),
        lambda folder: (folder / "state-00001" / "facts.json").unlink(),
        lambda folder: (folder / "state-00001" / "facts.json").write_text("no"),
        lambda folder: (folder / "state-00001" / "global.safetensors").write_bytes(b"no"),
        lambda folder: os.truncate(folder / "state-00001" / "global.safetensors", 300),
    ],
)
def test_a_damaged_checkpoint_is_refused(tmp_path, damage):
    checkpoint.save(tmp_path, 1, 10, state(1))
    damage(tmp_path)
    with pytest.raises(ValueError, match=str(tmp_path)):
        checkpoint.load(tmp_path)


def test_a_missing_adapter_of_the_state_is_noticed(tmp_path):
    checkpoint.save(tmp_path, 1, 10, state(1))
    (tmp_path / "state-00001" / "global.safetensors").unlink()
    with pytest.raises(ValueError, match=r"global"):
        checkpoint.load(tmp_path)


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "data"
    checkpoint.write(path, b"old")

    def die(descriptor):
        raise Died

    monkeypatch.setattr(os, "fsync", die)
    with pytest.raises(Died):
        checkpoint.write(path, b"newer")
    assert path.read_bytes() == b"old"
