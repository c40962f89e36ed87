"""Which runs may be resumed with which config, and which are over."""

import json

import pytest

from flexlora.errors import ProtocolError
from flexlora.federation import rounds, setup
from flexlora.federation.identity import check_same, identity, is_over
from flexlora.journal import Record
from flexlora.peft_format import WEIGHTS
from support import models


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    models.save(folder / "model")
    return folder


def prepared(folder, count):
    # A learning rate that decays from round to round, as of one run.
    settings = models.settings(
        folder,
        federation={"rounds": count},
        training={"learning_rate": 0.02, "round_decay": 0.5},
    )
    return setup.prepare(settings, models.corpus())


def test_more_rounds_continue_a_finished_run_to_the_bit(folder, tmp_path):
    list(rounds.run(prepared(folder, 1), tmp_path / "more"))
    events = list(rounds.run(prepared(folder, 3), tmp_path / "more", resume=True))
    assert [e["round"] for e in events if e["event"] == "round"] == [2, 3]
    list(rounds.run(prepared(folder, 3), tmp_path / "whole"))
    for number in (1, 2, 3):
        weights = [
            (rounds.adapter_folder(tmp_path / name, number) / WEIGHTS).read_bytes()
            for name in ("more", "whole")
        ]
        assert weights[0] == weights[1]


def test_a_finished_run_is_not_touched(folder, tmp_path):
    ready = prepared(folder, 1)
    list(rounds.run(ready, tmp_path))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert list(rounds.run(ready, tmp_path, resume=True)) == []
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def started(folder, settings, *more):
    record = Record(folder)
    record.append("start", config=json.loads(settings.model_dump_json()))
    for event, facts in more:
        record.append(event, **facts)
    return record


def test_the_keys_that_differ_are_named(folder, tmp_path):
    one = models.settings(folder)
    other = models.settings(folder, training={"learning_rate": 0.5}, seed=4)
    with pytest.raises(ProtocolError, match=r"differs in seed, training\.learning_rate\)"):
        check_same(other, identity(one), started(tmp_path, one))
    with pytest.raises(ProtocolError, match=r"another config; only"):
        check_same(other, identity(one), Record(tmp_path / "without a journal"))


def test_rounds_and_the_run_section_may_differ(folder, tmp_path):
    one = models.settings(folder)
    other = models.settings(folder, federation={"rounds": 70}, run={"keep_adapters": "last"})
    check_same(other, identity(one), Record(tmp_path))


def test_a_key_of_a_later_version_counts_with_its_default(folder, tmp_path):
    settings = models.settings(folder)
    record = started(tmp_path, settings)
    (start,) = record.events()
    del start["config"]["evaluation"]["answers"]
    record.path.unlink()
    record.append(**start)
    check_same(settings, "the hash of another version", record)
    changed = models.settings(folder, evaluation={"answers": 7})
    with pytest.raises(ProtocolError, match=r"differs in evaluation\.answers"):
        check_same(changed, "the hash of another version", record)


def test_a_run_is_over_once_it_has_all_rounds(folder, tmp_path):
    settings = models.settings(folder)  # of three rounds
    assert not is_over(settings, Record(tmp_path / "new"))
    assert not is_over(settings, started(tmp_path, settings))
    record = started(tmp_path, settings, ("finish", {"rounds": 3}))
    assert is_over(settings, record)
    assert not is_over(models.settings(folder, federation={"rounds": 5}), record)
    with pytest.raises(ProtocolError, match=r"is 2, but the run in .* has finished 3 rounds"):
        is_over(models.settings(folder, federation={"rounds": 2}), record)
    record.append("start", config={})
    assert not is_over(settings, record)
