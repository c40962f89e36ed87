"""Documentation that can fail: the map, the exports, the README's commands and links."""

import ast
import dataclasses
import pkgutil
import re
import shlex
from pathlib import Path

import pytest
import torch
import typer

import flexlora
from flexlora import config, peft_format
from flexlora.cli import main
from flexlora.data.corpora import table
from support import api_page, tiny_config
from support.factors import random_factors

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_map_names_every_subsystem():
    named = re.findall(r"^    (\w+)  ", flexlora.__doc__, re.MULTILINE)
    subsystems = [info.name for info in pkgutil.iter_modules(flexlora.__path__)]
    assert sorted(named) == sorted(name for name in subsystems if not name.startswith("_"))


def test_exports_exist():
    assert all(hasattr(flexlora, name) for name in flexlora.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        flexlora.nothing  # noqa: B018


def test_tab_completion_offers_the_public_names():
    offered = [name for name in dir(flexlora) if not name.startswith("_")]
    assert sorted(offered) == sorted(flexlora.__all__)


def test_type_checkers_see_the_public_names():
    """The imports for type checkers are those of the table: same names, same modules."""
    tree = ast.parse(Path(flexlora.__file__).read_text(encoding="utf-8"))
    branch = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.asname: statement.module.removeprefix("flexlora.")
        for statement in branch.body
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    }
    assert seen == flexlora._PUBLIC


def test_the_page_of_the_python_interface_is_up_to_date():
    assert api_page.PAGE.read_text(encoding="utf-8") == api_page.page(), "run: make docs"


def test_paths_may_be_strings(tmp_path):
    for name, rank in (("a", 2), ("b", 3)):
        factors = random_factors(11, rank, 7, seed=rank, dtype=torch.float32)
        peft_format.write(flexlora.Adapter({"layers.0.q_proj": factors}), tmp_path / name)
    out = str(tmp_path / "out")
    (module,) = flexlora.merge([str(tmp_path / "a"), str(tmp_path / "b")], out)
    assert module.rank == 5 and flexlora.check(out).modules == 1
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"instruction": "a", "input": "b", "output": "c"}\n', encoding="utf-8")
    assert len(table.read(str(rows))) == 1


def test_a_federation_runs_from_strings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # its tokens are kept in the working directory
    settings = flexlora.load(str(tiny_config.write(tmp_path)), ["federation.rounds=1"])
    settings = settings.model_copy(
        update={"model": dataclasses.replace(settings.model, name=str(tmp_path / "model"))}
    )
    events = list(flexlora.run(flexlora.prepare(settings), str(tmp_path / "run")))
    assert events[-1]["event"] == "finish" and (tmp_path / "run" / "metrics.jsonl").exists()


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
