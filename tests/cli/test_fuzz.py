"""Configs and command lines drawn at random: each works, or is refused in a sentence."""

import os
import random
import shutil
import tomllib

import pytest

from support import commands, fuzz, models, sizes, tiny_config

RAW = (
    *("Traceback", "This is a fault of flexlora", "Input should", "alue error", "[Errno"),
    *("codec can't", "pydantic", "no attribute"),
)
"""What other libraries and Python itself say."""

LONGEST = 2500
"""Characters of a refusal."""

HARMLESS = ("check", "compare", "configs", "eval", "init", "keys", "laws", "merge", "methods")
"""Commands that neither listen nor train nor connect, whatever the words; and ``run``, refused."""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working folder: a config that works, and what else a path may lead to."""
    models.load_once(monkeypatch, {})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HOME", str(tmp_path / "folder"))
    tiny_config.write(tmp_path)
    fuzz.places(tmp_path)
    return tmp_path


def check(result: commands.Result, case: object) -> None:
    """An error is one of ours, printable, not too long, and never a traceback."""
    assert result.code in (0, 1, 2), (case, result)
    assert not any(raw in result.err for raw in RAW), (case, result.err)
    if result.code == 2:
        assert "error: " in result.err and len(result.err) < LONGEST, (case, result.err)
        assert all(line.isprintable() for line in result.err.splitlines()), (case, result.err)


@pytest.mark.skipif(os.name == "nt", reason="links and paths of Unix")
@pytest.mark.filterwarnings("ignore")
@sizes.trials(20, 600)
def test_a_config_works_or_is_refused_in_a_sentence(folder, monkeypatch, capsys, trials):
    draw = random.Random(7)
    content = tomllib.loads((folder / "tiny.toml").read_text(encoding="utf-8"))
    codes = set()
    for trial in range(trials):
        text = fuzz.config(draw, content)
        (folder / "c.toml").write_bytes(text)
        result = commands.call(monkeypatch, capsys, "run", "c.toml", "--dry-run")
        check(result, (trial, text))
        codes.add(result.code)
    assert codes == {0, 2}  # both happen


@pytest.mark.skipif(os.name == "nt", reason="links and paths of Unix")
@pytest.mark.filterwarnings("ignore")
@sizes.trials(40, 1200)
def test_a_command_line_works_or_is_refused_in_a_sentence(folder, monkeypatch, capsys, trials):
    draw = random.Random(8)
    for trial in range(trials):
        words = fuzz.words(draw, HARMLESS)
        result = commands.call(monkeypatch, capsys, *words)
        check(result, (trial, words))
        for made in ("a", "auto", "none"):
            shutil.rmtree(folder / made, ignore_errors=True)
