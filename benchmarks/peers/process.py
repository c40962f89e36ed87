"""A peer's virtual environment, and a contestant's run in a separate process."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent

FOR_PEERS = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONPATH": str(HERE),
}
"""The environment variables of peers: no telemetry during measurements, and ``recipe`` on the
path."""


class NotMeasured(RuntimeError):
    """A contestant that could not be installed or did not finish; its text is the reason."""


@dataclass(frozen=True)
class Finished:
    """A successful process: its elapsed seconds, and the peak memory of it and its children."""

    seconds: float
    peak_mib: float


def environment(peer: str, folder: Path) -> Path:
    """The Python of a peer's virtual environment, created from its pinned requirements if needed.

    Raises:
        NotMeasured: the requirements cannot be installed.
    """
    pinned = HERE / peer / "requirements.txt"
    identity = hashlib.sha256(pinned.read_bytes() + sys.version.encode()).hexdigest()
    home, python = folder / peer, folder / peer / "bin" / "python"
    stamp = home / "requirements.sha256"
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == identity:
        return python
    print(f"Installing {peer} into {home}.", file=sys.stderr)
    shutil.rmtree(home, ignore_errors=True)
    home.parent.mkdir(parents=True, exist_ok=True)
    for command in (
        [sys.executable, "-m", "venv", str(home)],
        [str(python), "-m", "pip", "install", "--quiet", "-r", str(pinned)],
    ):
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        if done.returncode != 0:
            raise NotMeasured(f"{peer} could not be installed: {_reason(done.stderr)}")
    stamp.write_text(identity, encoding="utf-8")
    return python


def versions(python: Path, packages: Sequence[str]) -> dict[str, str]:
    """The versions of some packages in an environment."""
    code = "import sys, importlib.metadata as m; print(*map(m.version, sys.argv[1:]))"
    found = subprocess.run([python, "-c", code, *packages], stdout=subprocess.PIPE, text=True)
    return dict(zip(packages, found.stdout.split(), strict=True))


def run(command: Sequence[str], log: Path, variables: Mapping[str, str], limit: float) -> Finished:
    """Run a contestant to its end, with its output in ``log``.

    Raises:
        NotMeasured: it failed, or took longer than ``limit`` seconds.
    """
    started = time.perf_counter()
    with log.open("w", encoding="utf-8") as said:
        process = subprocess.Popen(
            command,
            stdout=said,
            stderr=subprocess.STDOUT,
            env={**os.environ, **variables},
            start_new_session=True,
        )
    watch = _Watch(process.pid)
    watch.start()
    try:
        code = process.wait(limit)
        seconds = time.perf_counter() - started
    except subprocess.TimeoutExpired:
        raise NotMeasured(f"It took more than {limit:.0f} s: {_tail(log)}") from None
    finally:
        watch.stop.set()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()
        watch.join()
    if code != 0:
        raise NotMeasured(f"It failed with {code}: {_tail(log)}")
    return Finished(seconds, watch.peak_kib / 1024)


class _Watch(threading.Thread):
    """Samples, twice a second, the memory of a process tree; shared pages count once."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid, self.stop, self.peak_kib = pid, threading.Event(), 0

    def run(self) -> None:
        """Look until told to stop."""
        while not self.stop.wait(0.5):
            self.peak_kib = max(self.peak_kib, sum(map(_pss_kib, _family(self.pid))))


def _family(pid: int) -> list[int]:
    """A process and its descendants."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()
            except (OSError, UnicodeDecodeError):
                continue  # it ended meanwhile
            parents[int(entry.name)] = int(fields[1])
    found = [pid]
    for one in found:  # grows while it is read
        found += [child for child, parent in parents.items() if parent == one]
    return found


def _pss_kib(pid: int) -> int:
    """The proportional set of a process; 0 once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)


def _tail(log: Path) -> str:
    return _reason(log.read_text(encoding="utf-8", errors="replace"))


def _reason(text: str) -> str:
    """The last error line, or the last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line or line.startswith("ERROR")]
    return (errors or lines or ["it said nothing"])[-1][:300]
