import json
import os

import pytest
import torch

from flexlora.errors import ProtocolError
from flexlora.federation import checkpoint
from flexlora.lowrank.factors import Adapter
from flexlora.method.interface import State
from flexlora.method.merge_log import MergeLog
from flexlora.storage import DamagedFile, read_sealed, write_sealed
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


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_last_one_and_the_one_before_are_kept(tmp_path):
    for round in range(4):
        checkpoint.save(tmp_path, round, 10 * round, state(round))
    assert_same(checkpoint.load(tmp_path).state, state(3))
    assert names(tmp_path) == ["checkpoint.json", "state-00002", "state-00003"]


def test_accepted_changes_come_back_to_the_bit(tmp_path):
    accepted = {"products": [{"q": 0.1 + 0.2}, {"q": 1e-300, "v": 3.0}]}
    assert checkpoint.save(tmp_path, 1, 0, state(1), accepted=accepted).accepted == accepted
    assert checkpoint.load(tmp_path).accepted == accepted


def damage(path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_damaged_file_of_the_newest_leads_to_the_one_before(tmp_path):
    for round in range(3):
        checkpoint.save(tmp_path, round, 0, state(round))
    whole = {path: path.read_bytes() for path in (tmp_path / "state-00002").iterdir()}
    assert len(whole) == 5
    for path, data in whole.items():
        damage(path)
        loaded = checkpoint.load_sound(tmp_path)
        assert [error.path for error in loaded.damaged] == [path]
        assert loaded.point.round == 1
        assert_same(loaded.point.state, state(1))
        path.unlink()
        assert checkpoint.load(tmp_path).round == 1
        path.write_bytes(data)
    assert checkpoint.load_sound(tmp_path).damaged == ()


@pytest.mark.parametrize("how", [damage, lambda path: path.unlink(), lambda p: p.write_bytes(b"")])
def test_a_damaged_pointer_leads_to_the_newest(tmp_path, how):
    for round in range(3):
        checkpoint.save(tmp_path, round, 0, state(round))
    how(tmp_path / checkpoint.POINTER)
    loaded = checkpoint.load_sound(tmp_path)
    assert loaded.point.round == 2 and len(loaded.damaged) == 1
    checkpoint.point_at(tmp_path, 2)
    assert checkpoint.load_sound(tmp_path).damaged == ()


def test_a_checkpoint_under_the_name_of_another_round_is_not_used(tmp_path):
    for round in range(3):
        checkpoint.save(tmp_path, round, 0, state(round))
    (tmp_path / "state-00002").rename(tmp_path / "aside")
    (tmp_path / "state-00001").rename(tmp_path / "state-00002")
    (tmp_path / "aside").rename(tmp_path / "state-00001")
    with pytest.raises(ProtocolError, match=r"state-00002/manifest\.json is that of round 1"):
        checkpoint.load(tmp_path)


def test_what_does_not_change_is_on_the_disk_as_often_as_checkpoints_are_kept(tmp_path):
    """So that one damaged file never damages both of them."""
    point = checkpoint.save(tmp_path, 1, 0, state(1))
    for round in range(2, 6):
        point = checkpoint.save(tmp_path, round, 0, point.state)
        newest, before = (tmp_path / f"state-{number:05d}" for number in (round, round - 1))
        for path in newest.glob("*.safetensors"):
            assert path.stat().st_ino != (before / path.name).stat().st_ino
            damage(path)
            assert checkpoint.load(tmp_path).round == round - 1
            damage(path)
    assert_same(point.state, state(1))


def test_a_damaged_file_is_not_copied_into_the_next_checkpoint(tmp_path):
    point = checkpoint.save(tmp_path, 1, 0, state(1))
    damage(tmp_path / "state-00001" / "update-00010.safetensors")
    with pytest.raises(DamagedFile, match=r"update-00010\.safetensors does not agree"):
        checkpoint.save(tmp_path, 2, 0, point.state)


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
        assert names(folder) == ["checkpoint.json", "state-00001", "state-00002"]
    assert 0 < count < 19


def test_nothing_to_resume_is_said(tmp_path):
    with pytest.raises(ValueError, match=r"no run to resume in .*checkpoint\.json is missing"):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "state-00001" / "manifest.json").unlink(),
        lambda folder: (folder / "state-00001" / "manifest.json").write_text("no"),
        lambda folder: (folder / "state-00001").rename(folder / "state-1"),
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


OLD = {
    1: {"round": 3, "journal_bytes": 1234, "identity": "ab", "together": 2, "state": "state-00003"},
    2: {"format": 2, "round": 3, "journal_bytes": 9, "identity": "ab", "state": "state-00003"},
}
"""Pointers of earlier versions by format."""


@pytest.mark.parametrize("written", OLD)
def test_a_run_of_an_earlier_version_is_refused_by_name(tmp_path, written):
    (tmp_path / checkpoint.POINTER).write_text(json.dumps(OLD[written]))
    (tmp_path / "state-00003").mkdir()
    for use in (checkpoint.load, checkpoint.journal_bytes):
        with pytest.raises(
            ProtocolError, match=rf"another version of flexlora .*format {written}"
        ) as caught:
            use(tmp_path)
        assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("file", [checkpoint.POINTER, "state-00001/manifest.json"])
def test_a_run_of_a_later_version_is_refused_too(tmp_path, file):
    checkpoint.save(tmp_path, 1, 10, state(1))
    path = tmp_path / file
    write_sealed(path, {**read_sealed(path), "format": checkpoint.FORMAT + 1})
    with pytest.raises(ProtocolError, match=rf"another version .*format {checkpoint.FORMAT + 1}"):
        checkpoint.load(tmp_path)
