"""Temporary folders go with their process, or at the next start."""

import os
import signal
import subprocess
import sys
import time

import pytest

from flexlora.errors import ConfigError
from flexlora.storage import scratch
from flexlora.storage.temporary import remove_abandoned

HOLD = """
import sys
from pathlib import Path
from flexlora.storage import scratch

with scratch("ray", Path(sys.argv[1])) as folder:
    (folder / "large").write_bytes(b"download")
    print(folder, flush=True)
    sys.stdin.read()
"""


def test_it_is_its_owners_alone_and_gone_afterwards(tmp_path):
    with scratch("laws", tmp_path) as folder:
        assert folder.parent == tmp_path and folder.stat().st_mode & 0o777 == 0o700
        (folder / "file").touch()
        with scratch(place=tmp_path) as second:
            assert folder.exists() and second != folder
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="POSIX signals")
def test_what_a_killed_process_left_is_removed_and_a_living_ones_is_not(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as first, subprocess.Popen(command, **pipes) as second:
        killed, living = (process.stdout.readline().strip() for process in (first, second))
        first.kill()
        first.wait()
        remove_abandoned(tmp_path)
        assert not os.path.exists(killed) and os.path.exists(f"{living}/large")
        second.stdin.close()
    assert list(tmp_path.iterdir()) == []


def test_nothing_else_is_removed(tmp_path):
    for name in ("flexlora-data", "flexlora-ray-abcdefgh", "other", "flexlora-abcdefgh"):
        (tmp_path / name).mkdir()
    (tmp_path / "flexlora-abcdefgh" / "rows.jsonl").touch()  # no lock: not made by `scratch`
    (tmp_path / "flexlora-abcdefg1").symlink_to(tmp_path / "other")
    before = sorted(tmp_path.iterdir())
    remove_abandoned(tmp_path)
    assert sorted(tmp_path.iterdir()) == before
    hour_ago = time.time() - 4000
    os.utime(tmp_path / "flexlora-ray-abcdefgh", (hour_ago, hour_ago))
    remove_abandoned(tmp_path)  # killed before it was locked
    assert sorted(set(before) - set(tmp_path.iterdir())) == [tmp_path / "flexlora-ray-abcdefgh"]


def test_no_place_for_temporary_files_is_a_sentence(tmp_path):
    refused = pytest.raises(ConfigError, match=r"No temporary folder .*set TMPDIR")
    with refused, scratch(place=tmp_path / "missing"):
        pass
