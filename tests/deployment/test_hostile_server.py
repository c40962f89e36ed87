"""A server of real processes that sends an app of its own: no node runs it."""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="needs flexlora[flower]")

from flexlora.deployment.flower.processes import environment, free_port
from support import flower, models

pytestmark = pytest.mark.slow

PROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "flexlora-app"
version = "1.0.0"
license = "Apache-2.0"
dependencies = []
[tool.flwr.app]
publisher = "flexlora"
[tool.flwr.app.components]
serverapp = "flexlora_app.server:app"
clientapp = "flexlora_app.client:app"
"""
CLIENT = """
from pathlib import Path
Path({marker!r}).write_text("a server's code ran on the node")
from flwr.clientapp import ClientApp
app = ClientApp()

@app.query()
def query(message, context):
    raise RuntimeError
"""
SERVER = """
import time
from pathlib import Path
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import ServerApp
app = ServerApp()

@app.main()
def main(grid, context):
    while not (nodes := list(grid.get_node_ids())):
        time.sleep(0.2)
    for _ in range(2):
        content = RecordDict({{"flexlora.header": ConfigRecord({{"json": "{{}}"}})}})
        (reply,) = grid.send_and_receive([Message(content, nodes[0], "query")], timeout=60)
        with Path({answers!r}).open("a") as file:
            file.write(str(reply.error.reason if reply.has_error() else "answered") + "\\n")
"""


@contextlib.contextmanager
def started(arguments, log: Path, env):
    with log.open("ab") as file:
        process = subprocess.Popen(
            arguments, stdout=file, stderr=subprocess.STDOUT, env=env, start_new_session=True
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def until(true, seconds: float, logs) -> None:
    end = time.monotonic() + seconds
    while not true():
        said = {path.name: path.read_text(errors="replace")[-1500:] for path in logs}
        assert time.monotonic() < end, said
        time.sleep(0.2)


def test_an_app_of_a_servers_own_does_not_run_on_a_node(tmp_path):
    port, marker, answers = free_port(), tmp_path / "marker", tmp_path / "answers"
    (answers).touch()
    home, app = tmp_path / "server", tmp_path / "app"
    home.mkdir()
    (app / "flexlora_app").mkdir(parents=True)
    (app / "pyproject.toml").write_text(PROJECT)
    (app / "flexlora_app" / "__init__.py").touch()
    (app / "flexlora_app" / "client.py").write_text(CLIENT.format(marker=str(marker)))
    (app / "flexlora_app" / "server.py").write_text(SERVER.format(answers=str(answers)))
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "x"\n[superlink.x]\naddress = "127.0.0.1:{port}"\n'
        "insecure = true\n"
    )
    (tmp_path / "data").mkdir()
    rows = flower.data_of(models.corpus(), tmp_path / "data")["client0"]
    programs, env = Path(sys.executable).parent, environment(home)
    superlink = [programs / "flower-superlink", "--host", "127.0.0.1", "--port", str(port)]
    join = [
        *(sys.executable, "-m", "flexlora", "join", f"127.0.0.1:{port}", "--insecure"),
        *("--name", "client0", "--data", str(rows), "--state", str(tmp_path / "state")),
    ]
    logs = [tmp_path / "superlink.log", tmp_path / "join.log"]
    with (
        started([*superlink, "--insecure"], logs[0], env),
        started(join, logs[1], {**os.environ, "OMP_NUM_THREADS": "1"}),
    ):
        until(lambda: b"Uvicorn running" in logs[0].read_bytes(), 60, logs)
        run = [programs / "flwr", "run", str(app), "x", "--format", "json"]
        said = subprocess.run(run, env=env, capture_output=True, text=True, timeout=120)
        assert said.returncode == 0, said.stdout + said.stderr
        until(lambda: answers.read_text().count("\n") == 2 or marker.exists(), 180, logs)
        time.sleep(1.0)
    assert not marker.exists(), marker.read_text()
    # The server is told, for every message, and the owner once.
    lines = answers.read_text().splitlines()
    assert len(lines) == 2 and all("this node runs no code of a server's" in x for x in lines)
    printed = logs[1].read_text()
    assert printed.count("refused: The server runs another app than the one") == 1
    assert json.loads((tmp_path / "state" / "flower" / "refused.json").read_text())
    assert not (tmp_path / "state" / "flower" / "apps").exists()
