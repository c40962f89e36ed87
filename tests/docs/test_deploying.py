"""docs/deploying.md and deploy/: the commands are those that there are, and they work."""

import hashlib
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

from flexlora import peft_format
from flexlora.cli import main
from flexlora.deployment.flower.processes import free_port
from flexlora.journal.record import Record
from flexlora.peft_format import WEIGHTS
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


SITES = ("mary", "north", "lake")


@pytest.fixture
def places(tmp_path):
    """The four machines of the page, as folders, with what their owners have."""
    places = {name: tmp_path / name for name in ("server", *SITES)}
    for place in places.values():
        place.mkdir()
    models.save(tmp_path / "model")
    rows = flower.data_of(models.corpus(rows=15), tmp_path)
    for number, site in enumerate(SITES):
        rows[f"client{number}"].rename(places[site] / f"{site}.jsonl")
    text = (ROOT / "configs" / "federation.toml").read_text(encoding="utf-8")
    text = text.replace("smollm2-135m-instruct", str(tmp_path / "model"))
    text = text.replace('prompt = "alpaca"', 'prompt = "plain"')
    (places["server"] / "federation.toml").write_text(
        text.replace("max_tokens = 256", "max_tokens = 32")
    )
    return places


@pytest.fixture
def start(places, tmp_path):
    """Starts a command of the page at a place, with free ports in place of the page's."""
    port, page_port, status_port = free_port(), free_port(), free_port()
    running: list[subprocess.Popen] = []

    def start(place: str, command: str) -> subprocess.Popen:
        command = command.replace("server.example", "localhost").replace(":8090", f":{port}")
        command = command.replace("0.0.0.0", "127.0.0.1")
        command = command.replace("127.0.0.1:8800", f"127.0.0.1:{page_port}")
        extra = {"join": ["--model", str(tmp_path / "model")]}
        extra["serve"] = ["--status", f"127.0.0.1:{status_port}"]
        words = shlex.split(command)
        with (tmp_path / f"{place}.log").open("ab") as log:
            running.append(
                subprocess.Popen(
                    [sys.executable, "-m", *words, *extra.get(words[1], [])],
                    cwd=places[place],
                    stdout=log,
                    stderr=log,
                    env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
                )
            )
        return running[-1]

    start.page = f"http://127.0.0.1:{page_port}/"
    yield start
    for process in running:
        process.terminate()
    for process in running:
        process.wait(60)


@pytest.mark.slow
def test_three_sites_as_the_page_says(places, start, tmp_path):
    """Every command of the page, by processes: at the end all four have the same adapter."""
    until, background = time.monotonic() + 400, {}
    run = places["server"] / "runs" / "federation"
    for place, waits, text in BLOCK.findall(PAGE):
        for line in text.strip().splitlines():
            if " watch " in line:  # nobody is that quick
                wait(lambda: (run / "config.json").exists(), until, tmp_path)
            process = start(place, line)
            if waits or " watch " in line:
                background[place, line.split()[1]] = process
                continue
            assert process.wait(120) == 0, logs(tmp_path)
            if place in SITES:
                shutil.copy(places[place] / "my-keys" / f"{place}.pub", places["server"])
            elif "--host" in line:
                for site in SITES:
                    shutil.copy(
                        places["server"] / "server-keys" / "ca.crt", places[site] / "my-keys"
                    )
    seen = ""
    while background["server", "serve"].poll() is None:
        assert time.monotonic() < until, logs(tmp_path)
        seen = fetched(start.page) or seen
        time.sleep(1)
    for site in SITES:
        assert background[site, "join"].wait(60) == 0, logs(tmp_path)

    journal = Record(run)
    assert [e["event"] for e in journal.events("finish", "stopped")] == ["finish"], logs(tmp_path)
    joined = {e["client"]: e["ranks"] for e in journal.events("joined")}
    assert joined == {"mary": [64], "north": [16], "lake": [8]}
    assert "north" in seen and "flexlora" in seen.lower()
    assert [e["received"] for e in journal.events("round")] == [3, 3, 3]
    assert_evaluated(journal, tmp_path)
    assert_delivered(run, places, tmp_path)
    before = journal.path.read_bytes()
    resumed = start("server", f"flexlora serve --resume {run} --keys server-keys")
    assert resumed.wait(60) == 0 and journal.path.read_bytes() == before, logs(tmp_path)


def assert_evaluated(journal: Record, folder: Path) -> None:
    """Every site evaluated the base and every round; the report has each of them."""
    evaluations = list(journal.events("client_evaluation"))
    assert [e["round"] for e in evaluations] == [0, 1, 2, 3]
    for event in evaluations:
        assert [row["client"] for row in event["clients"]] == sorted(SITES), logs(folder)
        assert event["missing"] == {} and event["worst"] in SITES
    assert evaluations[-1]["loss"] < evaluations[0]["loss"]
    report = (journal.folder / "report.html").read_text(encoding="utf-8")
    table = report[report.index("Scores on the clients") :]
    assert all(site in table for site in SITES)
    assert f"{evaluations[-1]['loss']:.3f}" in table
    console = (folder / "server.log").read_text()
    assert "evaluation by the clients after round 3 (3 clients" in console
    # Numbers travel, rows do not: the journal has no text of a row.
    assert "sees" not in journal.path.read_text()


def assert_delivered(run: Path, places: dict[str, Path], folder: Path) -> None:
    """The same file of weights everywhere, and the same digest in what everybody was told."""
    weights = (run / "rounds" / "00003" / "adapter" / WEIGHTS).read_bytes()
    digest = hashlib.sha256(weights).hexdigest()
    assert digest in (folder / "server.log").read_text()
    for site in SITES:
        adapter = places[site] / f"flexlora-{site}" / "adapter"
        assert (adapter / WEIGHTS).read_bytes() == weights
        assert peft_format.read(adapter).loaded().adapter.keys()
        said = (folder / f"{site}.log").read_text()
        assert f"SHA-256: {digest} (the same file as the server's)" in said
        assert "load it with PEFT: PeftModel.from_pretrained(" in said


def wait(true, until: float, folder: Path) -> None:
    while not true():
        assert time.monotonic() < until, logs(folder)
        time.sleep(0.2)


def fetched(url: str) -> str:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.read().decode()
    except OSError:
        return ""


def logs(folder: Path) -> str:
    paths = itertools.chain(folder.glob("*.log"), folder.rglob("flower/*.log"))
    return "\n".join(f"--- {p.name}\n{p.read_text(errors='replace')[-1500:]}" for p in paths)
