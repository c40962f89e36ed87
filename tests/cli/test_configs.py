"""The shipped configs: listed, copied, loadable, and part of the wheel."""

import re
import tomllib
from pathlib import Path

import pytest

from flexlora.cli import configs
from flexlora.federation import compose
from support import commands

NEED_NO_DATA = ("quickstart", "federation", "attack", "jobs")
ROOT = Path(__file__).parents[2]


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    return lambda *words: commands.call(monkeypatch, capsys, *words)


def test_all_are_listed_with_what_they_are_for(call):
    code, out, _ = call("configs")
    assert code == 0 and all(len(line) <= 80 for line in out.splitlines())
    for name in configs.names():
        line = next(line for line in out.splitlines() if line.startswith(f"{name} "))
        assert len(line.removeprefix(name).split()) > 3
    assert {"quickstart", "federation"} <= set(configs.names())


@pytest.mark.parametrize("word", ["quickstart", "Quickstart", "quickstart.toml"])
def test_one_is_copied_and_runs_as_it_stands(call, tmp_path, word):
    assert call("configs", word).out == "written: quickstart.toml\n"
    settings = compose.load(tmp_path / "quickstart.toml")
    assert settings.data.format == "procedural" and settings.federation.rounds > 0


def test_a_copy_replaces_nothing(call, tmp_path):
    (tmp_path / "smoke.toml").write_text("mine")
    result = call("configs", "smoke")
    assert result.code == 2 and "smoke.toml exists already" in result.err
    assert (tmp_path / "smoke.toml").read_text() == "mine"
    assert call("configs", "smoke", "--out", "new/other.toml").code == 0
    assert (tmp_path / "new" / "other.toml").is_file()


def test_init_without_a_file_is_the_quickstart(call, tmp_path):
    assert call("init").code == 0
    assert "flexlora run quickstart.toml" in call("init", "--out", "second.toml").out.replace(
        "second", "quickstart"
    )
    assert (tmp_path / "quickstart.toml").read_text() == (tmp_path / "second.toml").read_text()


@pytest.mark.parametrize("name", [n for n in configs.names() if n not in NEED_NO_DATA])
def test_one_without_its_data_says_how_to_get_it(call, name):
    call("configs", name)
    result = call("run", f"{name}.toml")
    assert result.code == 2 and result.out in ("", "reading the data and the model\n")
    assert re.match(r"error: There is no .*/natural-instructions/\w+\.parquet, which", result.err)
    assert "git clone --depth 1 https://github.com/allenai/natural-instructions, t" in result.err
    assert result.err.count("\n") == 1


@pytest.mark.parametrize("name", configs.names())
def test_each_begins_with_a_sentence(name):
    text = (ROOT / "configs" / f"{name}.toml").read_text(encoding="utf-8")
    assert text.startswith("# ") and len(configs.summary(text)) < 120


def test_the_wheel_has_them():
    """They are at the root of the repository, where the wheel's build takes them from."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    target = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert target["force-include"] == {"configs": "flexlora/configs"}


def test_an_installed_package_has_them_inside(monkeypatch, tmp_path):
    inside = tmp_path / "flexlora"
    (inside / "cli").mkdir(parents=True)
    (inside / "configs").mkdir()
    (inside / "configs" / "only.toml").write_text("# One.\n")
    monkeypatch.setattr(configs, "__file__", str(inside / "cli" / "configs.py"))
    assert configs.names() == ["only"]
