import json
import os

import pytest
import torch

from flexlora.errors import ProtocolError
from flexlora.federation import checkpoint
from flexlora.lowrank.factors import Adapter
from flexlora.method.interface import State
from flexlora.method.merge_log import MergeLog
from support.factors import random_factors
from support.states import adapters_of


def state(seed: int) -> State:
    update = Adapter({"model.up": random_factors(13, 4, 5, seed + 3, torch.float32)})
    return State(
        Adapter(
            {
                "model.up": random_factors(13, 2, 5, seed, torch.float32),
                "model.q": random_factors(11, 3, 7, seed + 1, torch.float32),
            }
        ),
        {"momentum": Adapter({"model.q": random_factors(11, 1, 7, seed + 2, torch.float32)})},
        {"route": {"model.up": "dense", "model.q": {"seed": seed}}},
        {"weights": {"anna": 13.0, "bo": 0.1 + seed}},
        MergeLog({2: update, 10: update}, {"anna": 2, "bo": seed}),
    )


def assert_same(got: State, want: State) -> None:
    assert got.per_module == want.per_module and got.per_client == want.per_client
    assert list(got.per_module["route"]) == list(want.per_module["route"])
    assert got.merge_log.merged_until == want.merge_log.merged_until
    assert list(adapters_of(got)) == list(adapters_of(want))
    for name, adapter in adapters_of(want).items():
        assert set(adapters_of(got)[name]) == set(adapter)
        for module, factors in adapter.items():
            assert torch.equal(adapters_of(got)[name][module].B, factors.B)
            assert torch.equal(adapters_of(got)[name][module].A, factors.A)


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
        lambda folder: (folder / "state-00001" / "model.safetensors").write_bytes(b"no"),
        lambda folder: os.truncate(folder / "state-00001" / "model.safetensors", 300),
    ],
)
def test_a_damaged_checkpoint_is_refused(tmp_path, damage):
    checkpoint.save(tmp_path, 1, 10, state(1))
    damage(tmp_path)
    with pytest.raises(ValueError, match=str(tmp_path)):
        checkpoint.load(tmp_path)


def test_a_missing_adapter_of_the_state_is_noticed(tmp_path):
    checkpoint.save(tmp_path, 1, 10, state(1))
    (tmp_path / "state-00001" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        checkpoint.load(tmp_path)


def test_a_run_of_an_earlier_version_is_refused_by_name(tmp_path):
    """Its pointer has no format."""
    pointer = {
        "round": 3,
        "journal_bytes": 1234,
        "identity": "ab",
        "together": 2,
        "state": "state-00003",
        "adapters": ["global"],
    }
    (tmp_path / checkpoint.POINTER).write_text(json.dumps(pointer))
    with pytest.raises(ProtocolError, match=r"another version of flexlora .*format 1") as caught:
        checkpoint.load(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert checkpoint.journal_bytes(tmp_path) == 1234


def test_a_run_of_a_later_version_is_refused_too(tmp_path):
    checkpoint.save(tmp_path, 1, 10, state(1))
    path = tmp_path / checkpoint.POINTER
    later = {**json.loads(path.read_text()), "format": checkpoint.FORMAT + 1}
    path.write_text(json.dumps(later))
    with pytest.raises(ProtocolError, match="another version of flexlora"):
        checkpoint.load(tmp_path)
