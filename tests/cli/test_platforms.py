"""Commands start and work where the modules that only Unix has are missing, as on Windows."""

import json
from pathlib import Path

import pytest

import support
from flexlora import peft_format
from support import tiny_config
from support.commands import python

NO_UNIX = Path(support.__file__).parent / "no_unix"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("windows")
    tiny_config.write(folder)
    return folder


@pytest.fixture
def flexlora(folder):
    """A function that runs ``flexlora words`` without the modules of Unix."""
    return lambda *words: python("-m", "flexlora", *words, cwd=folder, path=(NO_UNIX,))


def test_the_modules_are_hidden(folder):
    """Otherwise the tests below show nothing."""
    result = python("-c", "import fcntl", cwd=folder, path=(NO_UNIX,))
    assert result.code == 1 and "No module named 'fcntl'" in result.err


def test_the_program_starts(flexlora):
    assert flexlora("--help").code == 0


def test_a_federation_runs_and_its_adapters_are_checked_and_merged(flexlora, folder):
    result = flexlora("run", "tiny.toml", "--out", "run")
    assert result.code == 0, result.err
    lines = (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[-1])["event"] == "finish"
    adapters = [f"run/rounds/0000{number}/adapter" for number in (1, 2)]
    checked = flexlora("check", adapters[1])
    assert checked.code == 0 and "PEFT" in checked.out, checked.err
    merged = flexlora("merge", *adapters, "--out", "merged")
    assert merged.code == 0, merged.err
    assert peft_format.read(folder / "merged").ranks
    assert flexlora("report", "run").code == 0


def test_a_run_that_is_finished_is_not_begun_again(flexlora, folder):
    (folder / "old").mkdir()
    (folder / "old" / "checkpoint.json").write_text("{}")
    result = flexlora("run", "tiny.toml", "--out", "old")
    assert result.code == 2 and "already holds a run" in result.err
