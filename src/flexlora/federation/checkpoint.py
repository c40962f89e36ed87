"""What a run needs to go on after it was stopped anywhere, whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from flexlora import wire
from flexlora.errors import ProtocolError
from flexlora.method import State

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

POINTER = "checkpoint.json"
LOCK = ".lock"


@dataclass(frozen=True)
class Checkpoint:
    """The state after a round (0: before the first), and how long the journal was then.

    ``identity`` is that of the experiment; ``together`` is how many clients it trains at a
    time, which a resumed run repeats. The state's adapters are read from the disk module
    by module.
    """

    round: int
    journal_bytes: int
    state: State
    identity: str = ""
    together: int = 1


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Let no other process run in ``folder`` meanwhile; the lock falls with this process.

    Nothing is locked where the system has no such locks, as Windows has not.

    Raises:
        ProtocolError: another process runs there.
    """
    if fcntl is None or not folder.is_dir():
        yield
        return
    with (folder / LOCK).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ProtocolError(
                f"Another process runs in {folder}; let it end, or give another folder."
            ) from error
        yield


def save(
    folder: Path,
    round: int,
    journal_bytes: int,
    state: State,
    identity: str = "",
    together: int = 1,
) -> Checkpoint:
    """Write a checkpoint of the run in ``folder``, then forget the one before.

    The pointer file is replaced last and atomically: a crash leaves the old checkpoint or
    the new one.
    """
    name = f"state-{round:05d}"
    draft = folder / f".{name}.partial"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    for adapter, modules in state.adapters.items():
        target, before = draft / f"{adapter}.safetensors", wire.stored_at(modules)
        if before is not None and before.parent.parent == folder:
            # As it stands in the last checkpoint: a log of merged updates only grows.
            _same(before, target)
        else:
            write(target, wire.encode(modules, {"kind": "state"}, torch.float32))
    write(draft / "facts.json", json.dumps(dict(state.facts)).encode())
    shutil.rmtree(folder / name, ignore_errors=True)
    draft.rename(folder / name)
    pointer = {
        "round": round,
        "journal_bytes": journal_bytes,
        "identity": identity,
        "together": together,
        "state": name,
        "adapters": sorted(state.adapters),
    }
    write(folder / POINTER, json.dumps(pointer).encode())
    for old in folder.glob("state-*"):
        if old.name != name:
            shutil.rmtree(old)
    return load(folder)


def _same(source: Path, target: Path) -> None:
    """One file under two names, or a copy where the disk cannot have that."""
    try:
        os.link(source, target)
    except OSError:
        write(target, source.read_bytes())


def load(folder: Path) -> Checkpoint:
    """The last checkpoint of the run in ``folder``.

    Raises:
        ProtocolError: there is none, or its files are damaged.
    """
    try:
        pointer = json.loads((folder / POINTER).read_text(encoding="utf-8"))
        state = folder / pointer["state"]
        facts = json.loads((state / "facts.json").read_text(encoding="utf-8"))
        adapters = {
            name: wire.open_file(state / f"{name}.safetensors")[0] for name in pointer["adapters"]
        }
        known = State(adapters, facts)
        return Checkpoint(
            round=pointer["round"],
            journal_bytes=pointer["journal_bytes"],
            state=known,
            identity=pointer["identity"],
            together=pointer["together"],
        )
    except FileNotFoundError as error:
        raise ProtocolError(
            f"There is no run to resume in {folder}: {error.filename} is missing."
        ) from error
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ProtocolError(f"The checkpoint in {folder} is damaged: {error}.") from error


def journal_bytes(folder: Path) -> int:
    """How long the journal was at the last checkpoint of the run in ``folder``; 0 without one."""
    try:
        return int(json.loads((folder / POINTER).read_text(encoding="utf-8"))["journal_bytes"])
    except FileNotFoundError:
        return 0


def write(path: Path, data: bytes) -> None:
    """Write a file atomically: beside its place, to the disk, then renamed."""
    draft = path.with_name(f".{path.name}.partial")
    try:
        with draft.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        draft.unlink(missing_ok=True)  # of a full disk, half a file would stay for good
        raise
    draft.replace(path)
