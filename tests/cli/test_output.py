"""What commands print: readable on 80 columns, and nothing of other libraries."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from support import tiny_config
from support.commands import SOURCE, python

LIBRARIES = ("Loading weights", "it/s]", "s/it]", "Warning", "warn(", "TensorFlow", "HF_TOKEN")
ADAPTER = Path("runs/tiny/rounds/00002/adapter")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("output")
    tiny_config.write(folder)
    return folder


@pytest.fixture(scope="module")
def run(folder):
    """What a run prints."""
    result = python("-m", "flexlora", "run", "tiny.toml", cwd=folder)
    assert result.code == 0, result.err
    return result


def flexlora(folder, *words):
    result = python("-m", "flexlora", *words, cwd=folder)
    assert result.code == 0, result.err
    return result


def quiet(result):
    """Whether nothing of other libraries is in the output."""
    return result.err == "" and not any(word in result.out for word in LIBRARIES)


def test_a_run_prints_its_own_lines_only(run):
    assert quiet(run)
    assert f"adapter: {ADAPTER}" in run.out.splitlines()


def test_scores_fit_80_columns(run, folder):
    result = flexlora(folder, "eval", "tiny.toml", "--adapter", ADAPTER)
    lines = result.out.splitlines()
    assert quiet(result) and all(len(line) <= 80 for line in lines)
    assert lines[0].split() == ["clients", "rows", "Rouge-L", "exact", "match", "loss"]
    assert re.match(r" seen clients +2 +2 ", lines[1])


def test_eval_writes_every_answer(run, folder):
    flexlora(folder, "eval", "tiny.toml", "--adapter", ADAPTER, "--answers", "new/answers.jsonl")
    lines = (folder / "new" / "answers.jsonl").read_text().splitlines()
    assert len(lines) == 2
    assert {"prompt", "reference", "answer", "rouge_l"} < set(json.loads(lines[0]))


def test_a_comparison_fits_80_columns(folder):
    words = ("--methods", "flexlora,hetlora", "--seeds", "1", "--set", "federation.rounds=1")
    result = flexlora(folder, "compare", "tiny.toml", *words)
    assert quiet(result)
    table = result.out[result.out.index("hetlora and flexlora compared") :].splitlines()
    assert len(table) > 5 and [line for line in table if len(line) > 80] == []


def test_an_adapter_s_facts(run, folder):
    result = flexlora(folder, "check", ADAPTER)
    assert quiet(result)


def test_the_report_is_named(run, folder):
    assert flexlora(folder, "report", "runs/tiny").out.strip() == str(Path("runs/tiny/report.html"))


def test_lines_on_a_terminal_of_80_columns_break_between_words(folder):
    pty = pytest.importorskip("pty", reason="Windows has no pseudo-terminals")
    words = ["-m", "flexlora", "run", "tiny.toml", "--out", "terminal"]
    environment = {"COLUMNS": "80", "LINES": "24", "TERM": "xterm", "OMP_NUM_THREADS": "1"}
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [sys.executable, *words],
        cwd=folder,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, **environment, "PYTHONPATH": str(SOURCE)},
    ) as process:
        os.close(theirs)
        output = everything(ours)
        assert process.wait(60) == 0, output
    os.close(ours)
    assert not any(word in output for word in LIBRARIES)
    lines = [line for line in lasting(output) if not re.match(r"(adapter|report): ", line)]
    assert any(line.startswith("round 2: loss") for line in lines)
    assert [line for line in lines if len(line) > 80] == []


def everything(descriptor):
    """All that is written to a pseudo-terminal until the other side is closed."""
    chunks = []
    while True:
        try:
            chunk = os.read(descriptor, 65536)
        except OSError:  # on Linux this is how the end shows
            chunk = b""
        if not chunk:
            return b"".join(chunks).decode()
        chunks.append(chunk)


def lasting(output):
    """The lines of a terminal without colours and without those that were overwritten."""
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", lambda m: "\r" if m[0].endswith("K") else "", output)
    return [line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n")]
