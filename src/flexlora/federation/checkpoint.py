"""What a run needs to go on after it was stopped anywhere, whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flexlora import wire
from flexlora.errors import ProtocolError
from flexlora.lowrank import Adapter
from flexlora.method import MergeLog, State
from flexlora.storage import write_atomically

POINTER = "checkpoint.json"
FORMAT = 2
"""Raised whenever checkpoints change: those without one are of development versions."""


@dataclass(frozen=True)
class Checkpoint:
    """The state after a round (0: before the first), and how long the journal was then.

    ``identity`` is that of the experiment; ``clients_at_once`` is how many clients it trains at
    a time, which a resumed run repeats. The state's adapters are read from the disk module by
    module.
    """

    round: int
    journal_bytes: int
    state: State
    identity: str = ""
    clients_at_once: int = 1


def save(
    folder: Path,
    round: int,
    journal_bytes: int,
    state: State,
    identity: str = "",
    clients_at_once: int = 1,
) -> Checkpoint:
    """Write a checkpoint of the run in ``folder``, then remove the one before.

    The pointer file is replaced last and atomically: a crash leaves the old checkpoint or
    the new one.
    """
    name = f"state-{round:05d}"
    draft = folder / f".{name}.partial"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    for file, adapter in _files(state):
        target, source = draft / file, wire.stored_at(adapter)
        if source is not None and source.parent.parent == folder:
            # As it is in the last checkpoint: a log of base updates only grows.
            _link(source, target)
        else:
            write_atomically(target, wire.encode(adapter, {"kind": "state"}, torch.float32))
    facts = {
        "memory": list(state.memory),
        "updates": list(state.merge_log.updates),
        "merged_until": dict(state.merge_log.merged_until),
        "per_module": {name: dict(values) for name, values in state.per_module.items()},
        "per_client": {name: dict(values) for name, values in state.per_client.items()},
    }
    write_atomically(draft / "facts.json", json.dumps(facts).encode())
    shutil.rmtree(folder / name, ignore_errors=True)
    draft.rename(folder / name)
    pointer = {
        "format": FORMAT,
        "round": round,
        "journal_bytes": journal_bytes,
        "identity": identity,
        "clients_at_once": clients_at_once,
        "state": name,
    }
    write_atomically(folder / POINTER, json.dumps(pointer).encode())
    for old in folder.glob("state-*"):
        if old.name != name:
            shutil.rmtree(old)
    return load(folder)


def _files(state: State) -> Iterator[tuple[str, Adapter]]:
    """Every adapter of a state with the name of its file."""
    yield "model.safetensors", state.model
    for number, adapter in enumerate(state.memory.values()):
        yield f"memory-{number}.safetensors", adapter
    for round, update in state.merge_log.updates.items():
        yield f"update-{round:05d}.safetensors", update


def _link(source: Path, target: Path) -> None:
    """One file under two names, or a copy where the disk cannot have that."""
    try:
        os.link(source, target)
    except OSError:
        write_atomically(target, source.read_bytes())


def load(folder: Path) -> Checkpoint:
    """The last checkpoint of the run in ``folder``.

    Raises:
        ProtocolError: there is none, it is of another version of flexlora, or its files are
            damaged.
    """
    try:
        pointer = json.loads((folder / POINTER).read_text(encoding="utf-8"))
        _check_format(pointer, folder)
        state = folder / pointer["state"]
        facts = json.loads((state / "facts.json").read_text(encoding="utf-8"))
        return Checkpoint(
            round=pointer["round"],
            journal_bytes=pointer["journal_bytes"],
            state=_state(state, facts),
            identity=pointer["identity"],
            clients_at_once=pointer["clients_at_once"],
        )
    except FileNotFoundError as error:
        raise ProtocolError(
            f"There is no run to resume in {folder}: {error.filename} is missing."
        ) from error
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ProtocolError(f"The checkpoint in {folder} is damaged: {error}.") from error


def _check_format(pointer: Mapping[str, Any], folder: Path) -> None:
    written = pointer.get("format", 1)
    if written != FORMAT:
        raise ProtocolError(
            f"The run in {folder} was written by another version of flexlora (checkpoint format "
            f"{written}, this version has {FORMAT}). Finish it with the version that began it, or "
            f"start it again in another folder; its adapters and its journal can still be read."
        )


def _state(folder: Path, facts: Mapping[str, Any]) -> State:
    def adapter(file: str) -> Adapter:
        return wire.open_file(folder / file)[0]

    memory = {name: adapter(f"memory-{n}.safetensors") for n, name in enumerate(facts["memory"])}
    updates = {round: adapter(f"update-{round:05d}.safetensors") for round in facts["updates"]}
    return State(
        adapter("model.safetensors"),
        memory,
        facts["per_module"],
        facts["per_client"],
        MergeLog(updates, facts["merged_until"]),
    )


def journal_bytes(folder: Path) -> int:
    """How long the journal was at the last checkpoint of the run in ``folder``; 0 without one."""
    try:
        return int(json.loads((folder / POINTER).read_text(encoding="utf-8"))["journal_bytes"])
    except FileNotFoundError:
        return 0
