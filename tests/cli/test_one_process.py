"""One process in a run's folder, from its first look at it on: the second one writes nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flexlora.errors import ProtocolError
from flexlora.storage import locked
from support import models, sizes
from support.commands import SOURCE

TWO = """
import json, os, sys, time
sys.path[:0] = sys.argv[1].split(os.pathsep)
from pathlib import Path
from flexlora.cli import main
from flexlora.federation import compose, rounds, setup  # before the fork: they take seconds
from flexlora.reporting import page, tracker, trackers
import transformers

os.chdir(sys.argv[2])
for trial in range(int(sys.argv[3])):
    children = []
    for name, wait in (("one", 0.0), ("two", 0.05 * trial / max(int(sys.argv[3]) - 1, 1))):
        child = os.fork()
        if child == 0:
            out = os.open(f"{name}-{trial}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(out, 1), os.dup2(out, 2)
            time.sleep(wait)
            sys.argv = ["flexlora", "run", f"{name}.toml", "--out", f"run-{trial}"]
            try:
                main.main()
            except SystemExit as end:
                os._exit(int(end.code or 0))
            os._exit(99)
        children.append(child)
    ends = {str(i): os.waitstatus_to_exitcode(os.waitpid(c, 0)[1]) for i, c in enumerate(children)}
    Path(f"ends-{trial}").write_text(json.dumps(ends))
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@sizes.trials(3, 20)
def test_of_two_runs_in_one_folder_one_is_refused_and_writes_nothing(tmp_path, trials):
    """Started 0 to 50 ms apart, with different configs; the other one ends and can be resumed."""
    models.save(tmp_path / "model")
    rows = tmp_path / "rows.jsonl"
    row = {"instruction": "the cat", "input": "sees", "output": "a dog"}
    lines = [json.dumps(row | {"client": f"c{number % 6}"}) for number in range(30)]
    rows.write_text("\n".join(lines) + "\n")
    plain = {
        "model": {"targets": ["q_proj", "down_proj"]},
        "training": {"max_steps": 1},
        "federation": {"rounds": 2},
        "evaluation": {"base": False, "seen_clients": 0, "unseen_clients": 0},
    }
    for seed, name in enumerate(("one", "two")):
        data = {"path": str(rows), "unseen_clients": 0}
        models.write_config(tmp_path / f"{name}.toml", tmp_path, seed=seed, data=data, **plain)
    places = os.pathsep.join((str(SOURCE), str(Path(__file__).parents[1])))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    subprocess.run(
        [sys.executable, "-c", TWO, places, str(tmp_path), str(trials)],
        check=True,
        timeout=60 + 60 * trials,
        env=environment,
    )
    for trial in range(trials):
        ends = json.loads((tmp_path / f"ends-{trial}").read_text())
        assert sorted(ends.values()) == [0, 2], trial
        name, winner = ("one", 1) if ends["0"] == 2 else ("two", 0)
        said = (tmp_path / f"{name}-{trial}.log").read_text()
        assert said.count("error: ") == 1 and "Traceback" not in said
        # It names the process, unless that has had its lock for less than a moment.
        assert f"Another process runs in run-{trial}" in said
        config = json.loads((tmp_path / f"run-{trial}" / "config.json").read_text())
        assert config["seed"] == winner


def test_the_refusal_names_the_process_and_how_to_end_it(tmp_path):
    refused = pytest.raises(ProtocolError, match=rf"process {os.getpid()} \(.*kill {os.getpid()}$")
    with locked(tmp_path), refused, locked(tmp_path):
        raise AssertionError("locked twice")


def test_a_process_that_has_ended_is_not_named(tmp_path):
    with locked(tmp_path):
        (holder,) = tmp_path.glob("*.holder")
        ended = subprocess.Popen([sys.executable, "-c", ""])
        ended.wait()
        holder.write_text(json.dumps({"pid": ended.pid, "command": "flexlora run"}))
        with pytest.raises(ProtocolError) as caught, locked(tmp_path):
            raise AssertionError("locked twice")
        assert "kill" not in str(caught.value)
