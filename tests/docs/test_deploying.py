"""docs/deploying.md and deploy/: the commands are those that there are, and they work."""

import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import typer
import yaml

from flexlora.cli import main
from flexlora.deployment.flower.processes import free_port
from flexlora.journal.record import Record
from support import flower, models

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "deploying.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"```sh (\w+)( background)?\n(.*?)```", re.DOTALL)


def commands_of_manifests() -> list[str]:
    """Every flexlora command in the manifests, one line each."""
    found = []
    for path in sorted((ROOT / "deploy").rglob("*.yaml")):
        for document in yaml.safe_load_all(path.read_text(encoding="utf-8")):
            found += list(_commands(document))
    return found


def _commands(node):
    if isinstance(node, dict):
        for key in ("command", "args"):
            held = node.get(key)
            if not isinstance(held, list):
                continue
            if held[0] in ("serve", "join"):
                yield shlex.join(["flexlora", *held])
            for text in held:
                lines = text.replace("\\\n", " ").splitlines()
                yield from (
                    line.strip().removeprefix("exec ") for line in lines if "flexlora s" in line
                )
        for value in node.values():
            yield from _commands(value)
    elif isinstance(node, list):
        for value in node:
            yield from _commands(value)


def parsed(command: str) -> None:
    """Let the command line read a command, without doing what it says."""
    program, name, *arguments = shlex.split(command)
    assert program == "flexlora"
    known = typer.main.get_command(main.app)
    known.commands[name].make_context(name, arguments)


def commands_of_page() -> list[str]:
    blocks = [line for _, _, text in BLOCK.findall(PAGE) for line in text.strip().splitlines()]
    inline = [" ".join(text.split()) for text in re.findall(r"`(flexlora [a-z]+ [^`]*)`", PAGE)]
    return blocks + inline


@pytest.mark.parametrize("command", [*commands_of_page(), *commands_of_manifests()])
def test_every_command_is_one_that_there_is(command):
    parsed(command)


def test_there_are_commands_to_check():
    assert len(commands_of_page()) > 7
    assert sum("flexlora serve" in c for c in commands_of_manifests()) == 4
    assert sum("flexlora join" in c for c in commands_of_manifests()) == 2


def test_files_that_the_page_names_are_there():
    for target in re.findall(r"\]\(\.\./([^)]+)\)", PAGE):
        assert (ROOT / target).exists(), target


@pytest.fixture
def places(tmp_path):
    """The three machines of the page, as folders, with what their owners have."""
    places = {name: tmp_path / name for name in ("server", "ada", "bo")}
    for place in places.values():
        place.mkdir()
    models.save(tmp_path / "model")
    rows = flower.data_of(models.corpus(), tmp_path)
    rows["client0"].rename(places["ada"] / "ada.jsonl")
    rows["client1"].rename(places["bo"] / "bo.jsonl")
    text = (ROOT / "configs" / "federation.toml").read_text(encoding="utf-8")
    text = text.replace("smollm2-135m-instruct", str(tmp_path / "model"))
    text = text.replace('prompt = "alpaca"', 'prompt = "plain"')
    (places["server"] / "federation.toml").write_text(
        text.replace("max_tokens = 256", "max_tokens = 32")
    )
    return places


@pytest.mark.slow
def test_two_laptops_as_the_page_says(places, tmp_path):
    port, page_port = free_port(), free_port()
    running: dict[str, subprocess.Popen] = {}

    def start(place: str, command: str) -> subprocess.Popen:
        command = command.replace("server.example", "localhost").replace(":8090", f":{port}")
        command = command.replace("0.0.0.0", "127.0.0.1").replace(
            "127.0.0.1:8800", f"127.0.0.1:{page_port}"
        )
        extra = ["--model", str(tmp_path / "model")] if " join " in command else []
        with (tmp_path / f"{place}.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", *shlex.split(command), *extra],
                cwd=places[place],
                stdout=log,
                stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
            )

    until = time.monotonic() + 280
    try:
        for number, (place, background, text) in enumerate(BLOCK.findall(PAGE)):
            for line in text.strip().splitlines():
                if " watch " in line:  # nobody is that quick
                    while not (places["server"] / "runs" / "federation" / "config.json").exists():
                        assert time.monotonic() < until, logs(tmp_path)
                        time.sleep(0.2)
                process = start(place, line)
                if background or " watch " in line:
                    running[f"{number} {line}"] = process
                else:
                    assert process.wait(120) == 0
                if line.startswith("flexlora keys my-keys"):
                    exchange_keys(places["server"] / "server-keys", places[place] / "my-keys")
        journal = Record(places["server"] / "runs" / "federation")
        seen = ""
        while not list(journal.events("finish", "stopped")):
            assert time.monotonic() < until, logs(tmp_path)
            seen = fetched(f"http://127.0.0.1:{page_port}/") or seen
            time.sleep(1)
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait(60)
    assert [e["event"] for e in journal.events("finish", "stopped")] == ["finish"], logs(tmp_path)
    joined = {e["client"]: e["ranks"] for e in journal.events("joined")}
    assert joined == {"ada": [64], "bo": [8]}
    assert "ada" in seen and "flexlora" in seen.lower()
    assert all(e["received"] == 2 for e in journal.events("round"))


def exchange_keys(server: Path, client: Path) -> None:
    """Copy the files of the page's table."""
    for public in client.glob("*.pub"):
        shutil.copy(public, server / "nodes")
    shutil.copy(server / "ca.crt", client)


def fetched(url: str) -> str:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.read().decode()
    except OSError:
        return ""


def logs(folder: Path) -> str:
    paths = itertools.chain(folder.glob("*.log"), folder.rglob("flower/*.log"))
    return "\n".join(f"--- {p.name}\n{p.read_text(errors='replace')[-1500:]}" for p in paths)
