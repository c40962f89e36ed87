"""`flexlora run --dry-run`: what a run would do, without training and without a trace."""

import json
import re

import pytest

from flexlora.cli import dry_run
from flexlora.federation import compose, rehearsal, setup
from support import commands, tiny_config


@pytest.fixture
def config(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = tiny_config.write(tmp_path)
    capsys.readouterr()  # the model's library reports that it was written
    return path


@pytest.fixture
def call(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    return lambda *words: commands.call(monkeypatch, capsys, *words)


def test_it_shows_clients_ranks_bytes_time_and_two_prompts(call, config, tmp_path):
    code, out, err = call("run", "tiny.toml", "--dry-run")
    assert (code, err) == (0, "") and not (tmp_path / "runs").exists()
    flat = " ".join(out.split())
    assert re.search(r"6 that train on \d+ rows, 0 held out", flat)
    assert "rounds: 2, 3 clients in each" in flat
    assert re.search(r"about [\d.]+ KiB up and [\d.]+ KiB down", flat)
    assert re.search(r"time: about \d+ s on this machine", flat)
    assert re.search(r"small +3 +2 ", out) and re.search(r"large +3 +3 ", out)
    assert out.count(dry_run.START) == out.count(dry_run.END) == 4  # two lines name the marks
    assert all(len(line) <= 80 for line in out.splitlines() if not line.startswith("  | "))


def test_the_marked_part_is_the_response_with_its_end(call, config):
    out = call("run", "tiny.toml", "--dry-run").out
    for marked in re.findall(r"\| .*>>>(.*)<<<$", out, re.MULTILINE):
        assert marked.endswith("</s>")
    whole = call("run", "tiny.toml", "--dry-run", "--set", "training.prompt_loss=true").out
    assert re.search(r"^  \| >>>", whole, re.MULTILINE)


def test_bytes_and_steps_are_those_of_the_run(config, call, tmp_path):
    prepared = setup.prepare(compose.load(config))
    measured = rehearsal.rehearse(prepared)
    assert call("run", config).code == 0
    lines = (tmp_path / "runs" / "tiny" / "metrics.jsonl").read_text().splitlines()
    clients = [e for e in map(json.loads, lines) if e["event"] == "client" and e["round"] == 1]
    by_type = {each.name: each for each in measured.types}
    for event in clients:
        cost = by_type[event["rank_type"]]
        assert event["bytes_down"] == cost.bytes_down
        # The metrics in an upload have other digits.
        assert abs(event["bytes_up"] - cost.bytes_up) < 100
        assert cost.steps[0] <= event["steps"] <= cost.steps[1]
    evaluations = sum(json.loads(line)["event"] == "evaluation" for line in lines)
    assert measured.evaluations == evaluations


@pytest.mark.parametrize(
    "changes",
    [
        ["evaluation.every=1"],
        ["evaluation.truncated=true", "evaluation.base=false"],
        ["evaluation.seen_clients=0"],
    ],
)
def test_evaluations_are_counted_as_the_run_makes_them(config, call, tmp_path, changes):
    measured = rehearsal.rehearse(setup.prepare(compose.load(config, changes)))
    assert call("run", config, *[w for c in changes for w in ("--set", c)]).code == 0
    text = (tmp_path / "runs" / "tiny" / "metrics.jsonl").read_text()
    assert text.count('"event": "evaluation"') == measured.evaluations


@pytest.mark.parametrize("method", ["flexlora", "flasc", "fedplora"])
def test_methods_with_their_own_messages(config, method):
    changes = [f"method.name={method}", "ranks.distribution={small=1.0}"]
    settings = compose.load(config, changes)
    measured = rehearsal.rehearse(setup.prepare(settings))
    assert measured.bytes_down > 0 and measured.bytes_up > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("data.path=nothing.parquet", "nothing.parquet"),
        ("method.name=flexlore", "Did you mean 'flexlora'?"),
        ("data.unseen_clients=6", "some must train"),
        ("training.learning_rate=-1", "training.learning_rate"),
    ],
)
def test_errors_are_those_of_a_run(call, config, change, message):
    wet, dry = (call("run", config, "--set", change, *dry) for dry in ([], ["--dry-run"]))
    assert dry.code == wet.code == 2 and message in dry.err and dry.err == wet.err


def test_it_goes_with_no_option_that_trains(call, config):
    for words in (["--resume", "x"], ["--workers", "2"], ["--ray", "auto"]):
        assert "--dry-run trains nothing" in call("run", *words, "--dry-run").err


@pytest.mark.parametrize(
    ("change", "note"),
    [
        ("federation.cohort=40", "federation.cohort is 40, but only 6 clients train"),
        ("evaluation.seen_clients=0", "Nothing is evaluated"),
    ],
)
def test_what_the_data_changes_is_said_by_both(call, config, change, note):
    for words in (["--dry-run"], []):
        out = call("run", config, "--set", change, *words).out
        assert f"note: {note}" in " ".join(out.split())
    assert "note:" not in call("run", config, "--dry-run").out
