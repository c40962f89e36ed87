"""The command line as tests call it: in this process, or as a program of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from flexlora.cli import main

SOURCE = Path(__file__).parents[2] / "src"


class Result(NamedTuple):
    code: int
    out: str
    err: str


def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, *words: object) -> Result:
    """What ``flexlora words`` prints, and its exit code; run in this process."""
    monkeypatch.setattr(sys, "argv", ["flexlora", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        main.main()
    printed = capsys.readouterr()
    return Result(int(stop.value.code or 0), printed.out, printed.err)


def python(
    *words: object, cwd: Path, path: tuple[Path, ...] = (), seconds: float = 120, **variables: str
) -> Result:
    """What ``python words`` prints, as a process of its own.

    The folders ``path`` come first on its PYTHONPATH. Its terminal has 80 columns, unless the
    ``variables`` of its environment say otherwise.
    """
    places = os.pathsep.join(map(str, (*path, SOURCE)))
    environment = {
        **os.environ,
        **{"PYTHONPATH": places, "COLUMNS": "80", "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"},
        **variables,
    }
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        encoding="utf-8",
        timeout=seconds,
    )
    return Result(done.returncode, done.stdout, done.stderr)
