"""A run whose files are damaged goes on from what is whole, and says so."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from flexlora.errors import ProtocolError
from flexlora.federation import checkpoint, recovery, rounds, setup
from flexlora.federation.client_store import ClientStore
from flexlora.journal import JOURNAL, Record
from flexlora.lowrank import Adapter
from flexlora.peft_format import CONFIG, WEIGHTS
from support import models
from support.factors import random_factors

SETTINGS = {
    "evaluation": {"base": False, "seen_clients": 0, "unseen_clients": 0, "truncated": False},
    "training": {"max_steps": 1},
    "ranks": {"rank": 3, "types": None, "distribution": None},
}


class Runs:
    """A finished run of three rounds, and the same one stopped with two uploads of the third."""

    def __init__(self, folder: Path, method: str, **changes) -> None:
        models.save(folder / "model")
        settings = models.settings(folder, method={"name": method}, **{**SETTINGS, **changes})
        self.ready = setup.prepare(settings, models.corpus())
        self.whole, self.half = folder / "whole", folder / "half"
        list(rounds.run(self.ready, self.whole))
        events = rounds.run(self.ready, self.half)
        next(e for e in events if (e["event"], e.get("round")) == ("client", 3))
        next(events)
        events.close()

    def copy(self, target: Path) -> Path:
        shutil.copytree(self.half, target)
        return target

    def resumed(self, folder: Path) -> list[str]:
        """The sentences on what was damaged, of a run that ends in the right adapter."""
        events = list(rounds.run(self.ready, folder, resume=True))
        for name in (WEIGHTS, CONFIG):
            last = Path("rounds") / "00003" / "adapter" / name
            assert (folder / last).read_bytes() == (self.whole / last).read_bytes()
        recorded = [event["reason"] for event in Record(folder).events("damaged")]
        assert recorded == [e["reason"] for e in events if e["event"] == "damaged"]
        return recorded


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    torch.set_num_threads(1)
    return Runs(tmp_path_factory.mktemp("runs"), "flexlora")


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.slow
def test_nothing_is_said_of_a_run_without_damage(runs, tmp_path):
    folder = runs.copy(tmp_path / "run")
    assert runs.resumed(folder) == []
    assert sorted(path.name for path in folder.glob("state-*")) == ["state-00002", "state-00003"]


def test_a_damaged_checkpoint_costs_a_round_and_is_named(runs, tmp_path):
    folder = runs.copy(tmp_path / "run")
    damage(folder / "state-00002" / "model.safetensors")
    (said,) = runs.resumed(folder)
    assert "state-00002/model.safetensors does not agree with its checksum" in said
    assert "from its checkpoint after round 1" in said
    rounds_run = [event["round"] for event in Record(folder).events("round")]
    assert rounds_run == [1, 2, 3]  # the second once more, and once in the journal


def test_what_is_said_survives_a_stop_before_the_next_checkpoint(runs, tmp_path):
    folder = runs.copy(tmp_path / "run")
    damage(folder / "state-00002" / "manifest.json")
    for _ in range(2):
        events = rounds.run(runs.ready, folder, resume=True)
        next(e for e in events if e["event"] == "client")
        events.close()
    events = list(rounds.run(runs.ready, folder, resume=True))
    assert [e for e in events if e["event"] == "damaged"] == []  # mended before
    assert len(list(Record(folder).events("damaged"))) == 1


def test_a_damaged_upload_is_asked_for_again(runs, tmp_path):
    folder = runs.copy(tmp_path / "run")
    upload = sorted((folder / "uploads-00003").glob("*.safetensors"))[0]
    damage(upload)
    (said,) = runs.resumed(folder)
    assert upload.name in said and "asked again" in said


def test_a_damaged_journal_keeps_its_other_lines(runs, tmp_path):
    folder = runs.copy(tmp_path / "run")
    path = folder / JOURNAL
    before = path.read_bytes()
    path.write_bytes(before.replace(b'"rank_type"', b'"rank_tipe"', 1))
    (said,) = runs.resumed(folder)
    assert "metrics.jsonl is damaged" in said and "adapters are not affected" in said
    assert len(list(Record(folder).events("client"))) == 11
    (aside,) = folder.glob(f"damaged-*-{JOURNAL}")
    assert aside.read_bytes() == before.replace(b'"rank_type"', b'"rank_tipe"', 1)


@pytest.mark.parametrize("file", [WEIGHTS, CONFIG])
def test_the_adapter_of_a_finished_run_is_written_again(runs, tmp_path, file):
    folder = tmp_path / "run"
    shutil.copytree(runs.whole, folder)
    assert rounds.is_complete(runs.ready.experiment, folder)
    damage(folder / "rounds" / "00003" / "adapter" / file)
    assert not rounds.is_complete(runs.ready.experiment, folder)
    assert runs.resumed(folder) == []
    assert rounds.is_complete(runs.ready.experiment, folder)


def test_uploads_of_a_later_round_go_with_a_checkpoint_that_is_lost(runs, tmp_path):
    """They were made from a state that will not come back where clients are real ones."""
    folder = runs.copy(tmp_path / "run")
    damage(folder / "state-00002" / "manifest.json")
    recovery.resume(folder)
    assert not (folder / "uploads-00003").exists()


def test_leftovers_of_kills_are_removed(runs, tmp_path):
    folder = runs.copy(tmp_path / "run")
    shutil.copytree(folder / "state-00001", folder / "state-00000")
    shutil.copytree(folder / "state-00001", folder / ".state-00004.partial")
    adapter = folder / "rounds" / "00001"
    leftovers = [folder / ".0a1b.partial", adapter / ".adapter.00.old", adapter / ".x.partial"]
    for path in leftovers:
        path.touch()
    assert runs.resumed(folder) == []
    names = sorted(path.name for path in folder.iterdir())
    assert names == sorted({path.name for path in runs.whole.iterdir()})
    assert not any(path.exists() for path in leftovers)


@pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")
def test_what_a_run_writes_is_its_owners_alone_whatever_the_umask(runs):
    published = runs.whole / "rounds"
    for path in (runs.half, *runs.half.rglob("*")):
        if not path.is_relative_to(runs.half / "rounds"):
            private = 0o700 if path.is_dir() else 0o600
            assert path.stat().st_mode & 0o777 == private, path
    assert (published / "00003" / "adapter" / WEIGHTS).stat().st_mode & 0o044


def test_both_checkpoints_damaged_is_a_sentence_that_names_both(runs, tmp_path):
    folder = runs.copy(tmp_path / "run")
    for number in (1, 2):
        damage(folder / f"state-{number:05d}" / "model.safetensors")
    with pytest.raises(ProtocolError, match=r"state-00002/model.* state-00001/model.*Restore"):
        list(rounds.run(runs.ready, folder, resume=True))


# What clients keep


@pytest.mark.slow
def test_a_damaged_part_of_a_client_is_made_again(tmp_path):
    runs = Runs(tmp_path, "fedsalora")
    for number, spoil in enumerate((damage, Path.unlink)):
        folder = runs.copy(tmp_path / f"run-{number}")
        file = sorted((folder / "private" / "kept").glob("*/00002.safetensors"))[0]
        spoil(file)
        (said,) = runs.resumed(folder)
        assert "private/kept/" in said and "from its checkpoint after round 1" in said


@pytest.mark.slow
def test_damaged_merged_updates_are_restored(tmp_path):
    runs = Runs(tmp_path, "flora")
    for number, name in enumerate(("00001.safetensors", "00001.safetensors.sha256")):
        folder = runs.copy(tmp_path / f"run-{number}")
        whole = (folder / "private" / "merged" / "00001.safetensors").read_bytes()
        damage(folder / "private" / "merged" / name)
        shutil.copy(folder / "private" / "merged" / "00001.safetensors", folder / "private/x")
        assert runs.resumed(folder) == []
        assert (folder / "private" / "merged" / "00001.safetensors").read_bytes() == whole


def test_an_update_that_changed_replaces_the_one_that_is_kept(tmp_path):
    """A server that lost its last checkpoint has run a round again, with other clients."""
    store = ClientStore(tmp_path)
    for seed in (1, 2):
        update = Adapter({"model.up": random_factors(13, 2, 5, seed, torch.float32)})
        store.add_updates({3: update})
        (kept,) = store.updates_before(4)
        assert torch.equal(kept["model.up"].B, update["model.up"].B)


def test_a_run_is_begun_once_it_has_a_checkpoint(tmp_path):
    assert not checkpoint.is_begun(tmp_path)
    (tmp_path / "state-00000").mkdir()
    assert not checkpoint.is_begun(tmp_path)  # killed before the pointer was written
    (tmp_path / "state-00001").mkdir()
    assert checkpoint.is_begun(tmp_path)  # the pointer was deleted
