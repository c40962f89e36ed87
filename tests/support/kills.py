"""A program that dies: runs of the tiny federation, each killed at its own point, then resumed.

Every run is a fork of this process, which has loaded the model and has trained nothing. The
kill is SIGKILL, which nothing can catch. Usage: kills.py FOLDER POINT...; a point is a name
of ``POINTS``, or a number n: before the n-th time that a file of the run is opened for writing,
written to the disk, renamed, removed or cut, or a folder made. With one of ``FAULTS`` after the
number, as in 17:EIO, the system refuses this change instead. Numbers far beyond the last change
are left out. What a process has written outlives it, so that nothing waits for the disk.
"""

import errno
import json
import os
import signal
import stat
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from flexlora import peft_format
from flexlora.errors import sentence
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


FAULTS = ("EIO", "ENOSPC", "full", "half")
"""EIO or ENOSPC once; a disk that stays full; half of a file written, and then ENOSPC."""

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"}
NEEDS_ROOM = {"open", "os.mkdir", "fsync"}


def at_change(folder: Path, act: Callable[[int, str, int | None], None]) -> None:
    """Call ``act`` before every change of a file in ``folder``: its number, its kind and, of a
    write to the disk, the descriptor.
    """
    count = 0

    def changing(kind: str, descriptor: int | None = None) -> None:
        nonlocal count
        count += 1
        act(count, kind, descriptor)

    def watch(event: str, arguments: tuple) -> None:
        if event == "open":
            if not (isinstance(arguments[2], int) and arguments[2] & WRITING):
                return
        elif event not in CHANGES:
            return
        # rmtree names what it removes without its folder.
        if str(folder) in str(arguments[0]) or event in ("os.remove", "os.rmdir"):
            changing(event)

    os.fsync = lambda descriptor: changing("fsync", descriptor)
    sys.addaudithook(watch)


def dying(at: int) -> Callable[[int, str, int | None], None]:
    def act(number: int, kind: str, descriptor: int | None) -> None:
        if number == at:
            die()

    return act


def refusing(at: int, fault: str) -> Callable[[int, str, int | None], None]:
    """The system's refusal of one change, or of all that need room from then on."""

    def act(number: int, kind: str, descriptor: int | None) -> None:
        if number == at and fault == "half" and descriptor is not None:
            status = os.fstat(descriptor)
            if stat.S_ISREG(status.st_mode):  # no folder, which is written to the disk too
                os.truncate(descriptor, status.st_size // 2)
        if number == at or (fault == "full" and number > at and kind in NEEDS_ROOM):
            code = errno.EIO if fault == "EIO" else errno.ENOSPC
            raise OSError(code, os.strerror(code))

    return act


COUNT = "count"
"""The point of a run that nothing happens to; the number of its changes goes to a file."""

CHANGES_MADE = "changes"

BEYOND = 3
"""How many numbers are tried that are larger than that of the last change."""


def go(ready: PreparedRun, folder: Path, point: str | None, resume: bool) -> None:
    turns = None
    number, _, fault = (point or "").partition(":")
    if point == COUNT:
        folder.mkdir(exist_ok=True)
        numbers = folder.parent / CHANGES_MADE
        at_change(folder, lambda number, kind, descriptor: numbers.write_text(str(number)))
    elif number.isdigit():
        folder.mkdir(exist_ok=True)
        at_change(folder, refusing(int(number), fault) if fault else dying(int(number)))
    elif point is not None:
        turns = POINTS[point]()
    notes = folder.with_suffix(".resumed" if resume else ".notes")
    notes.touch()
    federation = Noted(SimulatedTransport(ready.runtime, 2), notes, turns)
    for _ in rounds.run(ready, folder, federation, resume=resume):
        pass


def forked(ready: PreparedRun, folder: Path, point: str | None, resume: bool = False) -> str:
    """How the run ended: ``killed``, ``finished``, ``refused`` with a sentence, or ``failed``."""
    child = os.fork()
    if child == 0:
        try:
            go(ready, folder, point, resume)
        except BaseException as error:
            print(f"{point}: {type(error).__name__}: {error}", file=sys.stderr)
            os._exit(1 if sentence(error) is None else 2)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return "killed"
    return ["finished", "failed", "refused"][os.waitstatus_to_exitcode(status)]


def main(folder: Path, points: list[str]) -> None:
    models.save(folder / "model")
    settings = models.settings(
        folder,
        model={"targets": ["q_proj", "down_proj"]},
        training={"max_steps": 1},
        evaluation={"every": 2},
    )
    ready = setup.prepare(settings, models.corpus())
    os.fsync = lambda descriptor: None
    ends = {"whole": [forked(ready, folder / "whole", COUNT)]}
    changes = int((folder / CHANGES_MADE).read_text())
    for point in points:
        number = point.partition(":")[0]
        if number.isdigit() and int(number) > changes + BEYOND:
            continue
        target = folder / point
        ends[point] = [forked(ready, target, point)]
        if ends[point] != ["finished"]:
            # Before the first checkpoint there is nothing to go on with.
            ends[point].append(forked(ready, target, None, resume=checkpoint.is_begun(target)))
    (folder / "ends.json").write_text(json.dumps(ends))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
