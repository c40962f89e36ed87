"""Documentation that can fail: the map, the exports, the README's commands and links."""

import pkgutil
import re
import shlex
from pathlib import Path

import pytest
import typer

import flexlora
from flexlora import config
from flexlora.cli import main

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_map_names_every_subsystem():
    named = re.findall(r"^    (\w+)  ", flexlora.__doc__, re.MULTILINE)
    subsystems = [info.name for info in pkgutil.iter_modules(flexlora.__path__)]
    assert sorted(named) == sorted(name for name in subsystems if not name.startswith("_"))


def test_exports_exist():
    assert all(hasattr(flexlora, name) for name in flexlora.__all__)


def test_links_and_configs_of_the_readme_exist():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
    for target in re.findall(r"configs/[\w-]+\.toml", README):
        assert (ROOT / target).exists(), target


def test_the_config_of_the_readme_is_valid(tmp_path):
    example = re.search(r"```toml\n(.*?)```", README, re.DOTALL)[1]
    path = tmp_path / "config.toml"
    path.write_text(example)
    assert config.load(path).data.columns.client == "hospital"


def commands():
    blocks = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.startswith("flexlora ")]


@pytest.mark.parametrize("line", commands())
def test_the_options_of_the_readme_are_those_of_the_command(line):
    command, *rest = shlex.split(line)[1:]
    known = typer.main.get_command(main.app).commands[command].params
    options = {option for parameter in known for option in parameter.opts}
    for option in (word for word in rest if word.startswith("--")):
        assert option in options, option


def test_make_targets_of_the_readme_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\S+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
