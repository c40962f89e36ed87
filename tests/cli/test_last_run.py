"""Runs by their folder, or the last one: eval, report, watch, more rounds for a finished run."""

import json
import os
import shutil

import pytest

from flexlora import peft_format
from support import commands, tiny_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a config, and two finished runs of it, of which "second" is the last."""
    folder = tmp_path_factory.mktemp("runs")
    tiny_config.write(folder)
    for name in ("first", "second"):
        words = ("-m", "flexlora", "run", "tiny.toml", "--out", f"runs/{name}")
        result = commands.python(*words, "--set", "federation.rounds=1", cwd=folder)
        assert result.code == 0, result.err
    for path in (folder / "runs" / "first").iterdir():
        os.utime(path, (1e9, 1e9))
    return folder


@pytest.fixture
def call(monkeypatch, capsys, folder):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "80")
    return lambda *words: commands.call(monkeypatch, capsys, *words)


def journal(folder):
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_a_run_is_evaluated_by_its_folder(call):
    by_folder = call("eval", "runs/second")
    adapter = "runs/second/rounds/00001/adapter"
    assert by_folder.out.splitlines()[0] == f"adapter: {adapter}"
    by_hand = call("eval", "tiny.toml", "--adapter", adapter)
    assert by_folder.out.splitlines()[1:] == by_hand.out.splitlines()
    last = call("eval")
    assert last.out == by_folder.out and last.err == "eval: runs/second, the last run\n"


def test_settings_of_a_run_can_be_changed_to_evaluate_it(call):
    result = call("eval", "runs/second", "--set", "evaluation.rows_per_client=2")
    assert result.code == 0 and result.out != call("eval", "runs/second").out
    wrong = call("eval", "runs/second", "--set", "evaluation.rows=2")
    assert "--set evaluation.rows=2: unknown key 'evaluation.rows'" in wrong.err


def test_the_report_of_the_last_run(call, folder):
    result = call("report")
    assert result.out.strip() == "runs/second/report.html"
    assert result.err == "report: runs/second, the last run\n"


def test_watch_takes_the_last_run(call, monkeypatch):
    served = []
    monkeypatch.setattr("flexlora.reporting.watch.serve", lambda *words: served.append(words))
    call("watch")
    assert str(served[0][0]) == "runs/second"


def test_without_any_run_each_says_so(call, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for words in (["eval"], ["report"], ["watch"], ["run", "--resume"]):
        result = call(*words)
        assert result.code == 2 and "There is no run in" in result.err, words


def test_a_finished_run_says_so_and_is_not_touched(call, folder):
    before = (folder / "runs" / "second" / "metrics.jsonl").read_bytes()
    result = call("run", "--resume")
    assert result.code == 0 and "has finished all 1 rounds" in result.out
    assert "--set federation.rounds=2" in result.out
    assert result.err == "resume: runs/second, the last run\n"
    assert (folder / "runs" / "second" / "metrics.jsonl").read_bytes() == before


def test_rounds_are_added_to_a_finished_run(call, folder):
    shutil.copytree(folder / "runs" / "first", folder / "more")
    result = call("run", "--resume", "more", "--set", "federation.rounds=3")
    assert result.code == 0, result
    events = journal(folder / "more")
    assert [e["round"] for e in events if e["event"] == "round"] == [1, 2, 3]
    assert sum(e["event"] == "finish" for e in events) == 1
    whole = call("run", "tiny.toml", "--out", "whole", "--set", "federation.rounds=3")
    assert whole.code == 0
    weights = [f"{name}/rounds/00003/adapter" for name in ("more", "whole")]
    one, other = ((folder / w / peft_format.WEIGHTS).read_bytes() for w in weights)
    assert one == other
    assert json.loads((folder / "more" / "config.json").read_text())["federation"]["rounds"] == 3
    fewer = call("run", "--resume", "more", "--set", "federation.rounds=2")
    assert fewer.code == 2 and "has finished 3 rounds" in fewer.err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("training.learning_rate=1", "only federation.rounds and the section run may change"),
        ("federation.rounds=0", "'federation.rounds' is 0; give a whole number of at least 1."),
    ],
)
def test_what_a_resumed_run_may_not_change(call, folder, change, message):
    before = (folder / "runs" / "second" / "config.json").read_bytes()
    result = call("run", "--resume", "runs/second", "--set", change)
    assert result.code == 2 and message in result.err
    assert (folder / "runs" / "second" / "config.json").read_bytes() == before
