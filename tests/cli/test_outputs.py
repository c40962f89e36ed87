"""No command writes over what it has not written, or into a part of a run."""

import hashlib
import json
import re
import shlex
from pathlib import Path

import pytest

from flexlora.cli import outputs
from flexlora.errors import ConfigError
from flexlora.federation import compose, rounds, setup
from support import commands, models, tiny_config

KEYS = ("client", "loss")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run of one round that was stopped in the second."""
    folder = tmp_path_factory.mktemp("outputs")
    models.save(folder / "model")
    settings = models.settings(folder, federation={"rounds": 2}, evaluation={"every": 1})
    (folder / "run").mkdir()
    compose.store(settings, folder / "run")
    for event in rounds.run(setup.prepare(settings, models.corpus()), folder / "run"):
        if event["event"] == "client" and event["round"] == 2:
            break
    return folder / "run"


@pytest.fixture
def call(monkeypatch, capsys, run):
    monkeypatch.chdir(run.parent)
    return lambda *words: commands.call(monkeypatch, capsys, *words)


def suggested(error: pytest.ExceptionInfo) -> Path:
    return Path(shlex.split(str(error.value))[-1])


def test_no_file_of_a_run_is_an_output_and_the_remedy_is_one(run):
    present = sorted(path for path in run.rglob("*") if path.is_file())
    names = {path.relative_to(run).parts[0] for path in present}
    assert {"rounds", "uploads-00002", "state-00001", "checkpoint.json"} <= names
    for file in present:
        with pytest.raises(ConfigError) as caught:
            outputs.output_file(file, "--out", KEYS)
        outputs.output_file(suggested(caught), "--out", KEYS)
        assert not suggested(caught).exists()


def test_nothing_new_is_written_into_the_folders_of_a_run_or_in_the_place_of_its_files(run):
    new = [path / "new" for path in run.rglob("*") if path.is_dir()]
    new += [run / name for name in ("answers.jsonl", "Report.html", "serve.json", "flower/x")]
    new += [run / "rounds" / ".." / "rounds" / "00007" / "adapter", run / "private"]
    assert len(new) > 8
    for path in new:
        with pytest.raises(ConfigError, match="is a part of the run in"):
            outputs.refuse_parts_of_runs(path, "--out")


def test_what_is_beside_a_run_or_is_no_part_of_it_may_be_written(run, tmp_path):
    for path in (run / "scores.json", run / "mine" / "rounds", run.parent / "rounds", tmp_path):
        outputs.refuse_parts_of_runs(path, "--out")


def test_links_lead_to_what_they_name(run, tmp_path):
    (tmp_path / "folder").symlink_to(run)
    (tmp_path / "adapter").symlink_to(run / "rounds" / "00001" / "adapter")
    for path in (tmp_path / "folder" / "checkpoint.json", tmp_path / "adapter"):
        with pytest.raises(ConfigError, match="is a part of the run in"):
            outputs.refuse_parts_of_runs(path, "--out")


def test_only_own_files_are_written_again(tmp_path):
    row = dict.fromkeys(KEYS, 1)
    file = tmp_path / "scores.json"
    for text in (json.dumps([row, row]), "[]", "", f"{json.dumps(row)}\n{json.dumps(row)}\n"):
        file.write_text(text)
        outputs.output_file(file, "--out", KEYS)
    others = ("seed = 3", "[1]", '{"client": 1}', json.dumps([row | {"more": 1}]), "[" * 10**5)
    for other in (*map(str.encode, others), b"\xff\xfe", b"\0" * 9):
        file.write_bytes(other)
        with pytest.raises(ConfigError, match=r"has not written it; give --out a new file: --out "):
            outputs.output_file(file, "--out", KEYS)
        assert file.read_bytes() == other


def digests(folder: Path) -> dict[Path, str]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize(
    "words",
    [
        ("eval", "run", "--out", "run/checkpoint.json"),
        ("eval", "run", "--out", "run/rounds/00001/adapter/adapter_model.safetensors"),
        ("eval", "run", "--answers", "run/answers.jsonl"),
        ("merge", "run", "run", "--out", "run/rounds/00001/adapter", "--overwrite"),
        ("merge", "run", "run", "--out", "run/rounds/00009/adapter"),
        ("configs", "smoke", "--out", "run/serve.json"),
        ("init", "--out", "run/rounds/new.toml"),
        ("keys", "run/flower", "--host", "localhost"),
        ("run", "tiny.toml", "--out", "run/rounds/00001"),
        ("run", "tiny.toml", "--out", "run/private", "--dry-run"),
        ("compare", "tiny.toml", "--out", "run/state-00001"),
        ("attack", "tiny.toml", "--out", "run"),
        ("attack", "tiny.toml", "--out", "run/uploads-00002"),
        ("serve", "tiny.toml", "--insecure", "--out", "run/rounds"),
        ("demo", "--out", "run/rounds"),
        ("demo-flower", "--out", "run/rounds/new"),
        ("join", "h:1", "--data", "x", "--insecure", "--name", "a", "--state", "run/private"),
        ("join", "h:1", "--data", "x", "--insecure", "--name", "a", "--out", "run/rounds/a"),
    ],
)
def test_every_command_leaves_a_run_as_it_is(call, run, words):
    tiny_config.write(run.parent)
    before = digests(run)
    result = call(*words)
    assert result.code == 2 and result.err.count("\n") == 1, result
    assert re.search("part of the run in|something else than a simulation of att", result.err)
    assert digests(run) == before


def test_the_config_json_of_a_model_is_not_replaced_by_a_new_run(call, run):
    tiny_config.write(run.parent)
    before = digests(run.parent / "model")
    for words in (("run",), ("serve", "--insecure")):
        result = call(words[0], "tiny.toml", *words[1:], "--out", "model")
        assert result.code == 2 and "config.json is no config of a run" in result.err, result
    assert digests(run.parent / "model") == before


def test_eval_writes_its_own_files_again_and_no_other(call, run):
    tiny_config.write(run.parent)
    words = ("eval", "tiny.toml", "--out", "run/scores.json", "--answers", "run/own.jsonl")
    for _ in range(2):
        assert call(*words).code == 0
    assert json.loads((run / "scores.json").read_text())
    result = call("eval", "tiny.toml", "--out", "tiny.toml")
    assert result.code == 2 and "--out tiny-2.toml" in result.err
    result = call("eval", "tiny.toml", "--out", "new", "--answers", "run/../new")
    assert result.code == 2 and "--out and --answers are both new" in result.err
