"""Wrong inputs of every command: one sentence that names the value, and exit code 2."""

import json
import os
import sys

import pytest

from flexlora.cli import main
from support import commands

CONFIG = """
[model]
name = "x"
[data]
path = "d.parquet"
[ranks]
rank = 8
[federation]
rounds = 1
cohort = 2
"""
REMOTE = CONFIG.replace('path = "d.parquet"', 'format = "remote"')

FAULTS = [
    ("run", [], "Give a CONFIG.toml, or --resume DIR;"),
    ("run", ["missing.toml"], "missing.toml cannot be read"),
    ("run", ["folder"], "folder cannot be read"),
    ("run", ["latin.toml"], "valid TOML"),
    ("run", ["config.toml", "--set", "seed"], "--set takes KEY=VALUE"),
    ("run", ["config.toml"], "d.parquet"),
    ("run", ["config.toml", "--out", "file"], "The folder file cannot be made"),
    ("run", ["config.toml", "--out", "file/run"], "The folder file/run cannot be made"),
    ("run", ["--resume", "nowhere"], "There is no run to resume in nowhere"),
    ("run", ["--resume", "damaged"], "config.json is not valid JSON"),
    ("run", ["--resume", "damaged", "--exact"], "--resume takes the folder of a run"),
    ("compare", ["missing.toml"], "missing.toml cannot be read"),
    ("compare", ["config.toml", "--methods", "flexlore"], "There is no method 'flexlore'"),
    ("compare", ["config.toml", "--methods", ","], "--methods names no method"),
    ("compare", ["config.toml", "--seeds", "0"], "--seeds is 0"),
    ("compare", ["config.toml", "--option", "keep=1"], "--option takes METHOD.KEY=VALUE"),
    ("compare", ["config.toml", "--out", "file"], "file is a file"),
    ("compare", ["config.toml", "--out", "file/c"], "file"),
    ("eval", ["missing.toml"], "missing.toml cannot be read"),
    ("eval", ["config.toml", "--adapter", "nowhere"], "nowhere does not exist"),
    ("eval", ["config.toml", "--adapter", "file"], "file is a file"),
    ("eval", ["config.toml", "--out", "folder"], "folder is a folder"),
    ("eval", ["config.toml", "--out", "file/scores.json"], "give another --out"),
    ("merge", ["nowhere", "--out", "out"], "nowhere does not exist"),
    ("merge", ["folder", "--out", "out"], "adapter_config.json is missing"),
    ("merge", ["folder", "--out", "out", "--rank", "0"], ""),
    ("merge", ["folder", "--out", "out", "--weights", "a,b"], "--weights takes numbers"),
    ("check", ["nowhere"], "nowhere does not exist"),
    ("check", ["file"], "file is a file"),
    ("check", ["folder"], "adapter_config.json is missing"),
    ("methods", ["flexlore"], "Did you mean 'flexlora'?"),
    ("methods", ["FlexLoRE"], "Did you mean 'flexlora'?"),
    ("methods", [""], "There is no method ''"),
    ("report", ["nowhere"], "There is no run in nowhere"),
    ("report", ["folder"], "There is no run in folder"),
    ("report", ["damaged"], "metrics.jsonl"),
    ("watch", ["nowhere"], "There is no run in nowhere"),
    ("watch", ["folder"], "There is no run in folder"),
    ("watch", ["damaged", "--listen", "8800"], "--listen takes HOST:PORT"),
    ("watch", ["damaged", "--listen", "192.0.2.1:8800"], "cannot listen on 192.0.2.1"),
    ("keys", ["keys"], "--host"),
    ("keys", ["file", "--host", "localhost"], "file"),
    ("keys", ["file/keys", "--host", "localhost"], "file"),
    ("keys", ["keys", "--host", "not a host"], "not a host"),
    ("serve", ["--insecure"], "Give a CONFIG.toml, or --resume DIR."),
    ("serve", ["remote.toml"], "Give --keys DIR"),
    ("serve", ["remote.toml", "--insecure", "--listen", "x"], "--listen takes HOST:PORT"),
    ("serve", ["remote.toml", "--keys", "folder"], "folder"),
    ("serve", ["remote.toml", "--insecure", "--out", "file"], "file"),
    ("serve", ["--resume", "nowhere", "--insecure"], "nowhere"),
    ("join", ["localhost:8090", "--data", "rows.jsonl"], "Give --keys DIR"),
    ("join", ["localhost:8090", "--data", "rows.jsonl", "--keys", "nowhere"], "nowhere"),
    ("join", ["localhost:8090", "--data", "no.jsonl", "--insecure", "--name", "a"], "no.jsonl"),
    ("laws", ["no_such_method"], "There is no method"),
    ("laws", ["nowhere.py"], "There is no Python file"),
    ("run", ["config.toml", "--plugin", "file"], "There is no Python file"),
    ("laws", ["flexlora", "--option", "split"], "--option takes KEY=VALUE"),
    ("demo", ["--out", "file"], "The folder file cannot be made"),
    ("demo", ["--out", "finished"], "another version of flexlora"),
    ("demo", ["--out", "finished/mixed-ranks-8-64/checkpoint.json"], "cannot be made"),
    ("demo-flower", ["--out", "file"], "The folder file cannot be made"),
    ("demo-flower", ["--out", "folder"], "folder exists already"),
    ("demo-flower", ["--out", "file/new"], "file"),
    ("init", ["missing.jsonl"], "missing.jsonl"),
    ("init", ["rows.jsonl", "--out", "config.toml"], "config.toml exists already"),
    ("init", ["rows.jsonl", "--client-column", "x"], "Its columns are"),
    ("configs", ["quikstart"], "Did you mean 'quickstart'?"),
    ("configs", ["smoke", "--out", "config.toml"], "config.toml exists already"),
    ("configs", ["--out", "x"], "--out is for a copy"),
]


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """A function that runs ``flexlora words`` in a folder of wrong inputs."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("text")
    (tmp_path / "config.toml").write_text(CONFIG)
    (tmp_path / "remote.toml").write_text(REMOTE)
    (tmp_path / "latin.toml").write_bytes(b'seed = "\xe9"')
    (tmp_path / "rows.jsonl").write_text('{"instruction": "a", "input": "b", "output": "c"}\n')
    (tmp_path / "damaged").mkdir()
    for name in ("config.json", "metrics.jsonl"):
        (tmp_path / "damaged" / name).write_text("{\n")
    arm = tmp_path / "finished" / "mixed-ranks-8-64"
    arm.mkdir(parents=True)
    (arm / "checkpoint.json").write_text(json.dumps({}))
    monkeypatch.chdir(tmp_path)
    return lambda *words: commands.call(monkeypatch, capsys, *words)


@pytest.mark.parametrize(("command", "words", "message"), FAULTS)
def test_a_wrong_input_is_one_sentence(call, command, words, message):
    result = call(command, *words)
    assert result.code == 2, result
    assert result.err.startswith("error: ") and "Traceback" not in result.err
    assert message in result.err


def test_every_command_has_three_wrong_inputs():
    names = [name for group in main.COMMANDS.values() for name in group]
    for name in names:
        assert sum(command == name for command, _, _ in FAULTS) >= 3, name


@pytest.mark.parametrize(
    ("package", "section", "command"),
    [
        ("datasets", 'path = "squad"\nformat = "hub"', "pip install 'flexlora[hub]'"),
        ("reasoning_gym", 'format = "procedural"', "pip install 'flexlora[demo]'"),
    ],
)
def test_a_missing_extra_is_one_sentence_with_its_command(
    call, tmp_path, monkeypatch, package, section, command
):
    monkeypatch.setitem(sys.modules, package, None)
    path = tmp_path / "extra.toml"
    path.write_text(CONFIG.replace('path = "d.parquet"', section), encoding="utf-8")
    result = call("run", path)
    assert result.code == 2 and result.err.startswith("error: ") and command in result.err


@pytest.mark.parametrize("name", [name for group in main.COMMANDS.values() for name in group])
def test_an_unknown_option_is_named(call, name):
    result = call(name, "--no-such-option")
    assert result.code == 2 and "--no-such-option" in result.err


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize(("command", "words"), [("run", []), ("check", []), ("report", [])])
def test_what_may_not_be_read_is_one_sentence(call, tmp_path, command, words):
    place = tmp_path / ("config.toml" if command == "run" else "damaged")
    place.chmod(0)
    result = call(command, place, *words)
    place.chmod(0o700)
    assert result.code == 2 and "Traceback" not in result.err and place.name in result.err


def test_unknown_keys_are_named_with_line_and_nearest(call, tmp_path):
    path = tmp_path / "c.toml"
    path.write_text(CONFIG.lstrip().replace("[ranks]", "useen_clients = 3\n[ranks]"))
    result = call("run", path, "--set", "federation.rounds=many")
    assert result.code == 2
    assert "line 5: unknown key 'data.useen_clients'. Did you mean 'data.unseen_clients'?" in (
        result.err
    )
    assert "'federation.rounds' is 'many'" in result.err
