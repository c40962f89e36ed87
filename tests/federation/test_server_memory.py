"""The memory of a server: bounded by the size of a module, not by clients or rounds."""

import json
import sys
from pathlib import Path

import pytest

from support.commands import python

pytestmark = [
    pytest.mark.trust,
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status"),
]

TESTS = Path(__file__).parents[1]
PROGRAM = TESTS / "support" / "server_memory.py"

MIB = 2**20


def measured(folder: Path, *numbers: int) -> dict:
    result = python(PROGRAM, folder, *numbers, cwd=folder, path=(TESTS,), seconds=600)
    assert result.code == 0, result.err
    return json.loads(result.out.splitlines()[-1])


def test_a_round_of_many_clients_takes_a_few_matrices_of_one_module(tmp_path):
    """And of a client little beside the names and sizes in its upload, which has 2 MiB.

    The sum of a module is one matrix, and LAPACK's decomposition of it takes ten.
    """
    peaks = []
    for clients in (50, 200):
        folder = tmp_path / str(clients)
        folder.mkdir()
        peaks.append(measured(folder, clients, 1, 1024)["peak"])
        print(f"{clients} clients: +{peaks[-1] / MIB:.1f} MiB")
    assert peaks[1] < 20 * 8 * 1024**2
    assert peaks[1] - peaks[0] < 0.1 * 150 * 2 * MIB


def test_rounds_leave_nothing_in_memory(tmp_path):
    after = measured(tmp_path, 6, 200, 32)["after"]
    print(f"100 rounds: +{(after[-1] - after[-101]) / MIB:.2f} MiB")
    assert after[-1] - after[-101] < MIB
