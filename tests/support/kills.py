"""A program that dies: runs of the tiny federation, each killed at its own point, then resumed.

Every run is a fork of this process, which has loaded the model and has trained nothing. The
kill is SIGKILL, which nothing can catch. Usage: killing.py FOLDER POINT...; a point is a name
of ``POINTS`` or a number n: before the n-th time that a file of the run is opened for
writing, renamed, removed or cut, or a folder made.
"""

import json
import os
import signal
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from flexlora import peft_format
from flexlora.federation import checkpoint, collect, evaluations, rounds, setup
from flexlora.federation.client_turn import TurnRequest
from flexlora.federation.prepared import PreparedRun
from flexlora.federation.simulated import SimulatedTransport
from flexlora.federation.transport import LateReply, Lost, Reply, Transport, WaitPolicy
from flexlora.journal.answers import SampleAnswers
from flexlora.journal.record import Record
from flexlora.methods.flexlora import FlexLoRA
from support import models


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class Noted:
    """A federation that notes whom it trains, and dies after so many turns."""

    inner: Transport
    notes: Path
    turns: int | None = None

    @property
    def clients_at_once(self) -> int:
        return self.inner.clients_at_once

    def present(self, clients: Collection[str]) -> list[str]:
        return self.inner.present(clients)

    def exchange(
        self, jobs: Iterable[TurnRequest], patience: WaitPolicy
    ) -> Iterator[Reply | Lost | LateReply]:
        for reply in self.inner.exchange(self._noting(jobs), patience):
            if self.turns is not None and len(self.notes.read_text().split()) >= self.turns:
                die()
            yield reply

    def _noting(self, jobs: Iterable[TurnRequest]) -> Iterator[TurnRequest]:
        for job in jobs:
            with self.notes.open("a") as file:
                file.write(f"{job.round}:{job.client}\n")
            yield job


def at_call(owner: object, name: str, number: int, instead: Callable[..., object]) -> None:
    """Let the n-th call of ``owner.name`` do something else, and then die."""
    whole, calls = getattr(owner, name), []

    def counted(*arguments, **options):
        calls.append(1)
        if len(calls) == number:
            instead(whole, *arguments, **options)
            die()
        return whole(*arguments, **options)

    setattr(owner, name, counted)


def nothing(whole, *arguments, **options) -> None:
    pass


def all_of_it(whole, *arguments, **options) -> None:
    whole(*arguments, **options)


def half_a_file(whole, path: Path, data: bytes) -> None:
    with path.with_name(f".{path.name}.partial").open("wb") as file:
        file.write(data[: len(data) // 2])


def half_a_line(whole, record: Record, event: str, **fields) -> None:
    with record.path.open("a") as journal:
        journal.write(json.dumps({"event": event, **fields})[:20])


def half_a_folder(whole, partial: Path, directory: Path) -> None:
    (partial / "README.md").unlink()


EVALUATE = "evaluate_with_answers"

# Rounds of four clients: round 2 has the turns, uploads and client events 5 to 8.
POINTS: dict[str, Callable[[], int | None]] = {
    "after-2-turns-of-round-2": lambda: 6,
    "before-any-turn": lambda: 1,
    "half-an-upload": lambda: at_call(collect, "write_summed", 4 + 3, half_a_file),
    "half-a-line-of-the-journal": lambda: at_call(Record, "append", 2 + 4 + 2 + 3, half_a_line),
    "in-aggregate": lambda: at_call(FlexLoRA, "aggregate", 2, nothing),
    "after-aggregate": lambda: at_call(FlexLoRA, "aggregate", 2, all_of_it),
    "half-an-export": lambda: at_call(peft_format.writing, "_move", 2, half_a_folder),
    "before-the-checkpoint": lambda: at_call(checkpoint, "save", 3, nothing),
    "half-a-checkpoint": lambda: at_call(checkpoint, "write_atomically", 3, half_a_file),
    "after-the-checkpoint": lambda: at_call(checkpoint, "save", 3, all_of_it),
    "in-evaluation": lambda: at_call(evaluations, EVALUATE, 2, nothing),
    "after-the-last-evaluation": lambda: at_call(evaluations, EVALUATE, 3, all_of_it),
    "between-answers-and-scores": lambda: at_call(SampleAnswers, "append", 3, all_of_it),
}


def at_change(folder: Path, number: int) -> None:
    """Die before the n-th change of a file in ``folder``."""
    changes = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"}
    seen = []

    def watch(event: str, arguments: tuple) -> None:
        if event == "open":
            path, mode = arguments[0], arguments[1]
            if not isinstance(mode, str) or not set(mode) & set("wax+"):
                return
        elif event in changes:
            path = arguments[0]
        else:
            return
        # rmtree names what it removes without its folder.
        if str(folder) in str(path) or event in ("os.remove", "os.rmdir"):
            seen.append(event)
            if len(seen) == number:
                die()

    sys.addaudithook(watch)


def go(ready: PreparedRun, folder: Path, point: str | None, resume: bool) -> None:
    turns = None
    if point is not None and point.isdigit():
        folder.mkdir(exist_ok=True)
        at_change(folder, int(point))
    elif point is not None:
        turns = POINTS[point]()
    notes = folder.with_suffix(".resumed" if resume else ".notes")
    notes.touch()
    federation = Noted(SimulatedTransport(ready.runtime, 2), notes, turns)
    for _ in rounds.run(ready, folder, federation, resume=resume):
        pass


def forked(ready: PreparedRun, folder: Path, point: str | None, resume: bool = False) -> str:
    """How the run ended: ``killed``, ``finished`` or ``failed``."""
    child = os.fork()
    if child == 0:
        try:
            go(ready, folder, point, resume)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return "killed"
    return "finished" if os.waitstatus_to_exitcode(status) == 0 else "failed"


def main(folder: Path, points: list[str]) -> None:
    models.save(folder / "model")
    settings = models.settings(folder, evaluation={"every": 2})
    ready = setup.prepare(settings, models.corpus())
    ends = {"whole": [forked(ready, folder / "whole", None)]}
    for point in points:
        target = folder / point
        ends[point] = [forked(ready, target, point)]
        if ends[point] == ["killed"]:
            # Killed before the first checkpoint there is nothing to go on with.
            begun = (target / checkpoint.POINTER).exists()
            ends[point].append(forked(ready, target, None, resume=begun))
    (folder / "ends.json").write_text(json.dumps(ends))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
