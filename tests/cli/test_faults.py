"""Wrong inputs of every command: one sentence that names the value, and exit code 2."""

import json
import os
import re
import sys

import pytest

from flexlora.cli import main
from flexlora.errors import ConfigError
from flexlora.federation import compose
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
JOBS = """
[model]
name = "folder"
[[job]]
name = "a"
data.path = "rows.jsonl"
"""
REMOTE = CONFIG.replace('path = "d.parquet"', 'format = "remote"')

FAULTS = [
    ("run", [], "Give a CONFIG.toml, or --resume DIR;"),
    ("run", ["missing.toml"], "missing.toml cannot be read"),
    ("run", ["folder"], "folder cannot be read"),
    ("run", ["latin.toml"], "save it as UTF-8"),
    ("run", ["empty.toml"], "the sections [model], [data], [ranks], [federation] are missing"),
    ("run", ["windows.toml"], "line 1, is not valid TOML"),
    ("run", ["rows.jsonl"], "write a config for them with: flexlora init rows.jsonl"),
    ("run", ["quickstart.toml"], "copy it with: flexlora configs quickstart"),
    ("run", ["config.toml", "--set", "evaluation.engine=vllm"], "pip install vllm"),
    ("run", ["config.toml", "--set", "run.trackers=['wnadb']"], "There is no tracker 'wnadb'"),
    ("run", ["config.toml", "--set", "data.cache=file"], "set data.cache to another folder"),
    ("run", ["config.toml", "--plugin", "faulty.py"], "line 1, cannot be imported"),
    ("run", ["--resume"], "There is no run in"),
    ("laws", ["faulty.py"], "line 1, cannot be imported"),
    ("eval", ["folder"], "There is no run in folder"),
    ("eval", ["quickstart.toml"], "flexlora configs quickstart"),
    ("run", ["config.toml", "--set", "seed"], "--set takes KEY=VALUE"),
    ("run", ["config.toml"], "d.parquet"),
    ("run", ["config.toml", "--out", "file"], "The folder file cannot be made"),
    ("run", ["config.toml", "--out", "file/run"], "The folder file/run cannot be made"),
    ("run", ["config.toml", "--workers", "0"], "see: flexlora run --help"),
    ("run", ["config.toml", "--foldr", "x"], "No such option"),
    ("compare", ["config.toml", "--seeds", "x"], "'x' is not a valid integer"),
    ("merge", ["--out", "x"], "Missing argument"),
    ("run", ["--resume", "nowhere"], "There is no run to resume in nowhere"),
    ("run", ["--resume", "damaged"], "config.json is not valid JSON"),
    ("run", ["--resume", "damaged", "--exact"], "--resume takes the folder of a run"),
    ("compare", ["missing.toml"], "missing.toml cannot be read"),
    ("attack", ["missing.toml"], "missing.toml cannot be read"),
    ("attack", ["config.toml", "--attacks", "sign-flop"], "There is no attack 'sign-flop'"),
    ("attack", ["config.toml", "--share", "2"], "is 2.0; it is in (0, 0.5)"),
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
    ("eval", ["config.toml", "--out", "file"], "give --out a new file: --out file-2"),
    ("eval", ["config.toml", "--answers", "damaged/rounds/a"], "part of the run in"),
    ("attack", ["config.toml", "--out", "damaged"], "something else than a simulation"),
    ("merge", ["folder", "--out", "damaged/rounds/a"], "damaged/a-2"),
    ("eval", ["config.toml", "--out", "file/scores.json"], "give another --out"),
    ("run", ["work.toml"], "is a file of jobs; train them with: flexlora train work.toml"),
    ("train", [], "Missing argument"),
    ("train", ["missing.toml"], "missing.toml cannot be read: No such file"),
    ("train", ["jobs.toml"], "copy it with: flexlora configs jobs"),
    ("train", ["config.toml"], "start it with: flexlora run config.toml"),
    ("train", ["windows.toml"], "line 1, is not valid TOML"),
    ("train", ["empty.toml"], "has no jobs; begin each with the line [[job]]"),
    ("train", ["work.toml", "--set", "defaults.rank=0"], "'rank' is 0; give a whole number"),
    ("train", ["work.toml", "--set", "defaults.data.prompt=alpacca"], "no prompt 'alpacca'"),
    ("train", ["work.toml", "--out", "file"], "The folder file cannot be made"),
    ("train", ["work.toml", "--out", "file/new"], "The folder file/new cannot be made"),
    ("train", ["work.toml"], "'folder'"),
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


RAW = (
    "Traceback",
    "Input should",
    "alue error",
    "[Errno",
    "codec can't",
    "pydantic",
    "no attribute",
)
"""What other libraries and Python itself say."""

CHANGES = [
    ("federation.rounds=many", "'many'; give a whole number of at least 1."),
    ("federation.rounds=2.5", "is 2.5; give a whole number"),
    ("federation.fraction=2", "give a number above 0 and at most 1, or leave it out."),
    ("ranks.distribution=3", "give a text in quotes or a table whose values are each a number"),
    ("ranks.types.a={attention='x',feed_forward=1}", "'x'; give a whole number of at least 0."),
    ("model=3", "give a section with the keys name, dtype"),
    ("model.dtype=float23", 'Did you mean "float32"?'),
    ("model.targets=q_proj", 'give a list of texts, such as ["a", "b"], or leave it out.'),
    ("training.schedule=linaer", 'Did you mean "linear"?'),
    ("training.learning_rate=nan", "is nan; give a finite number."),
    ("training.max_steps=none", "give a whole number, or leave it out."),
    ("data.columns=3", "give a section with the keys instruction"),
    ("data.colums={}", "Did you mean 'data.columns'?"),
    ("evaluation.base=1", "give true or false."),
    ("evaluation.every=-1", "evaluation.every is -1; give at least 0."),
    ("run.trackers=tensorboard", "give a list of texts"),
    ("method=flexlora", 'give a section, such as { name = "..." }'),
    ("seed=-1", "give a whole number of at least 0."),
]


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """A function that runs ``flexlora words`` in a folder of wrong inputs."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("text")
    (tmp_path / "config.toml").write_text(CONFIG)
    (tmp_path / "remote.toml").write_text(REMOTE)
    (tmp_path / "work.toml").write_text(JOBS)
    (tmp_path / "latin.toml").write_bytes(b'seed = "\xe9"')
    (tmp_path / "empty.toml").touch()
    (tmp_path / "windows.toml").write_text('path = "C:\\data"')
    (tmp_path / "faulty.py").write_text("import nothing_of_this_name")
    (tmp_path / "rows.jsonl").write_text('{"instruction": "a", "input": "b", "output": "c"}\n')
    (tmp_path / "damaged").mkdir()
    for name in ("config.json", "metrics.jsonl"):
        (tmp_path / "damaged" / name).write_text("{\n")
    arm = tmp_path / "finished" / "mixed-ranks-8-64"
    arm.mkdir(parents=True)
    (arm / "checkpoint.json").write_text(json.dumps({"round": 1}))
    monkeypatch.chdir(tmp_path)
    return lambda *words: commands.call(monkeypatch, capsys, *words)


@pytest.mark.parametrize(("command", "words", "message"), FAULTS)
def test_a_wrong_input_is_one_sentence(call, command, words, message):
    result = call(command, *words)
    assert result.code == 2, result
    assert result.err.startswith("error: ") and result.err.count("\n") == 1, result.err
    assert not any(raw in result.err for raw in RAW), result.err
    assert message in result.err


@pytest.mark.parametrize(("change", "message"), CHANGES)
def test_a_wrong_value_is_one_sentence_with_its_place(call, change, message):
    result = call("run", "config.toml", "--set", change)
    assert result.code == 2 and result.err.count("\n") == 1, result.err
    assert result.err.startswith(f"error: --set {change}: ") and message in result.err
    assert not any(raw in result.err for raw in RAW), result.err


@pytest.mark.parametrize(
    "changes", [["ranks.distribution=uniform"], ["ranks.types={}", "ranks.table=x"]]
)
def test_a_remedy_is_accepted_when_it_is_typed(tmp_path, changes):
    """A sentence that says "set KEY to VALUE" is followed until the config is accepted."""
    path = tmp_path / "c.toml"
    path.write_text(CONFIG, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        compose.load(path, changes)
    remedies = re.findall(r"(?:set|and) (ranks\.\w+) to (\S+?)(?:,|\.$| )", str(caught.value))
    assert remedies and compose.load(path, [*changes, *map("=".join, remedies)]).ranks.rank == 8


def test_a_config_in_utf_8_with_a_mark_is_read(tmp_path):
    (tmp_path / "c.toml").write_bytes(b"\xef\xbb\xbf" + CONFIG.encode())
    assert compose.load(tmp_path / "c.toml").ranks.rank == 8


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
