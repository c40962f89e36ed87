"""The contestants, each in separate processes, with their trials and turns."""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peers.process import FOR_PEERS, HERE, NotMeasured, environment, run

OURS = "flexlora"
RELOADING = "Flower, model loaded in each call"
KEEPING = "Flower, model kept in each process"
PFL = "pfl"


@dataclass(frozen=True)
class Contestant:
    """A peer's script and its arguments."""

    peer: str
    options: Sequence[str] = ()

    def command(self, python: Path, workers: int) -> list[str]:
        """The command that starts it; only pfl gets its number of processes from a launcher."""
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={workers}"]
        how = launch if self.peer == "pfl" and workers > 1 else []
        script = str(HERE / self.peer / "simulate.py")
        return [str(python), *how, script, f"--workers={workers}", *self.options]


CONTESTANTS = {
    RELOADING: Contestant("flower"),
    KEEPING: Contestant("flower", ("--keep",)),
    PFL: Contestant("pfl"),
}


@dataclass(frozen=True)
class Turn:
    """One process of a contestant: seconds of its rounds and in total, and its clients' work."""

    seconds: float
    peak_mib: float
    workers: int
    round_seconds: Sequence[float]
    loss_total: float
    loss_tokens: float
    tokens: float

    @property
    def round(self) -> float:
        """The median of the seconds of a round."""
        return statistics.median(self.round_seconds)

    @property
    def outside(self) -> float:
        """The seconds before the first round and after the last."""
        return self.seconds - sum(self.round_seconds)


@dataclass(frozen=True)
class Race:
    """The inputs of every turn: the options, the folder of the tasks, the peers' Pythons."""

    options: argparse.Namespace
    work: Path
    pythons: Mapping[str, Path]

    def turn(self, name: str, task: str, workers: int, out: Path) -> Turn:
        """One process of a contestant, which writes its result to ``out``.

        Raises:
            NotMeasured: it failed or took too long.
        """
        options, variables = self.options, {}
        if name == OURS:
            job = ["--job", "--work", str(self.work), "--out", str(out)]
            command = [sys.executable, *sys.argv, *job]
        else:
            contestant = CONTESTANTS[name]
            command = contestant.command(self.pythons[contestant.peer], workers)
            command += [f"--work={self.work / task}", f"--out={out}"]
            command += [f"--threads={options.threads}"]
            variables = {**FOR_PEERS, "OMP_NUM_THREADS": str(options.threads // workers)}
        out.mkdir()
        done = run(command, out / "log.txt", variables, options.limit)
        result = json.loads((out / "result.json").read_text(encoding="utf-8"))
        found = Turn(done.seconds, done.peak_mib, workers, **result)
        print(f"{name}, {task}, {workers} processes: {found.round:.1f} s", file=sys.stderr)
        return found

    def trial(self, name: str) -> dict[int, float]:
        """Seconds of a round of few clients, by each number of processes that works.

        Raises:
            NotMeasured: no number of processes works.
        """
        found, faults = {}, []
        for workers in self.options.workers:
            out = self.work / f"trial, {name}, {workers}"
            try:
                found[workers] = self.turn(name, "trial", workers, out).round
            except NotMeasured as fault:
                faults.append(f"{workers} processes: {fault}")
        if not found:
            raise NotMeasured(" ".join(faults))
        return found


def installed(folder: Path) -> tuple[dict[str, Path], dict[str, str]]:
    """The Pythons of the peers that can be installed, and why the others cannot."""
    pythons, faults = {}, {}
    for name, contestant in CONTESTANTS.items():
        try:
            pythons[contestant.peer] = environment(contestant.peer, folder)
        except NotMeasured as fault:
            faults[name] = str(fault)
    return pythons, faults


def tried(race: Race, faults: dict[str, str]) -> dict[str, dict[int, float]]:
    """The trial of each peer, by its name; Flower's keeps the model in each process.

    A peer that fails for every number of processes is added to ``faults``.
    """
    found: dict[str, dict[int, float]] = {}
    for name in (KEEPING, PFL):
        peer = CONTESTANTS[name].peer
        if name in faults or len(race.options.workers) == 1:
            found[peer] = dict.fromkeys(race.options.workers, math.nan)
            continue
        try:
            found[peer] = race.trial(name)
        except NotMeasured as fault:
            faults |= {n: str(fault) for n, one in CONTESTANTS.items() if one.peer == peer}
    return found


def measure(race: Race, faults: dict[str, str]) -> dict[str, Any]:
    """The trials, then all contestants alternately, ``repeats`` times.

    A contestant that fails is left out from then on, and its reason is added to ``faults``.
    """
    trials = tried(race, faults)
    workers = {OURS: 1}
    for name, contestant in CONTESTANTS.items():
        if name not in faults:
            seconds = trials[contestant.peer]
            workers[name] = min(seconds, key=lambda count: seconds[count])
    turns: dict[str, list[Turn]] = {name: [] for name in workers}
    for number in range(race.options.repeats):
        for name in [name for name in workers if name not in faults]:
            out = race.work / f"turn {number}, {name}"
            try:
                turns[name].append(race.turn(name, "task", workers[name], out))
            except NotMeasured as fault:
                if name == OURS:
                    raise
                faults[name] = str(fault)
    return {"trials": trials, "turns": {n: t for n, t in turns.items() if n not in faults}}
