"""What a run needs to go on after it was stopped anywhere, whole or not at all.

A checkpoint is a folder, ``state-00003``, with the adapters of the server's state and a manifest:
all other values, and the SHA-256 of every file. The pointer, a small file in the run's folder,
names the newest checkpoint and the one before, which is kept in case the newest is damaged.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import torch

from flexlora import wire
from flexlora.errors import ProtocolError
from flexlora.journal import Mark, Record
from flexlora.lowrank import Adapter
from flexlora.method import MergeLog, State
from flexlora.storage import (
    DamagedFile,
    copy_verified,
    link_or_copy,
    make_private,
    read_sealed,
    sha256,
    sync_folder,
    write_atomically,
    write_sealed,
)

POINTER: Final = "checkpoint.json"
MANIFEST: Final = "manifest.json"
FORMAT: Final = 3
"""Raised whenever checkpoints change: 2 had no checksums, those without one are older still."""

_FOLDER: Final = re.compile(r"state-(\d{5,})")


@dataclass(frozen=True)
class Checkpoint:
    """The state after a round (0: before the first), and how long the journal was then.

    ``identity`` is that of the experiment; ``clients_at_once`` is how many clients it trains at
    a time, which a resumed run repeats. The state's adapters are read from the disk module by
    module. ``accepted`` are the changes that the next round's uploads are compared with.
    """

    round: int
    journal: Mark
    state: State
    identity: str = ""
    clients_at_once: int = 1
    accepted: Mapping[str, Any] = field(default_factory=dict)

    @property
    def journal_bytes(self) -> int:
        """How long the journal was."""
        return self.journal.bytes


@dataclass(frozen=True)
class Loaded:
    """A checkpoint, and what is damaged of those that are newer, or of the pointer."""

    point: Checkpoint
    damaged: tuple[DamagedFile, ...]


def save(
    folder: Path,
    round: int,
    journal: Mark | int,
    state: State,
    identity: str = "",
    clients_at_once: int = 1,
    accepted: Mapping[str, Any] | None = None,
) -> Checkpoint:
    """Write a checkpoint of the run in ``folder``; the one before is kept, older ones removed.

    The pointer is replaced last and atomically: a crash leaves the old checkpoint or the new one.
    ``journal`` may be the length alone, of which the hash is then computed. Hashes what it writes,
    and reads again only files that it copies.

    Raises:
        DamagedFile: a file of the checkpoint before, which belongs to this one too, is damaged.
    """
    if isinstance(journal, int):
        journal = Mark(journal, Mark.start().after(Record(folder).path, journal).sha256)
    point = Checkpoint(round, journal, state, identity, clients_at_once, accepted or {})
    name = name_of(round)
    draft = folder / f".{name}.partial"
    shutil.rmtree(draft, ignore_errors=True)
    make_private(draft)
    kept = {path: _sums(path) for path in map(folder.joinpath, map(name_of, _numbers(folder)))}
    sums = {file: _write(draft / file, adapter, kept) for file, adapter in _files(state)}
    write_sealed(draft / MANIFEST, _manifest(point, sums))
    sync_folder(draft)
    shutil.rmtree(folder / name, ignore_errors=True)
    draft.rename(folder / name)
    point_at(folder, round)
    # As a resumed run would read it: whole numbers may have become text, tuples lists.
    return replace(point, state=_state(folder / name, read_sealed(folder / name / MANIFEST)))


def point_at(folder: Path, round: int) -> None:
    """Let the run in ``folder`` go on from a checkpoint; the one before it is kept, others go.

    Nothing is written where the pointer says so already.
    """
    before = next((old for old in _numbers(folder) if old < round), None)
    content = {"format": FORMAT, "state": name_of(round), "previous": None}
    if before is not None:
        content["previous"] = name_of(before)
    sync_folder(folder)
    try:
        is_right = _pointer(folder) == content
    except (FileNotFoundError, ProtocolError):
        is_right = False
    if not is_right:
        write_sealed(folder / POINTER, content)
        sync_folder(folder)
    for old in _numbers(folder):
        if old not in (round, before):
            shutil.rmtree(folder / name_of(old))


def load(folder: Path) -> Checkpoint:
    """The last checkpoint of the run in ``folder`` whose files are as they were written.

    Raises:
        ProtocolError: see ``load_sound``.
    """
    return load_sound(folder).point


def load_sound(folder: Path) -> Loaded:
    """The last checkpoint whose files are as they were written, and what is not. Reads them once.

    Raises:
        ProtocolError: there is none, it is of another version of flexlora, or all are damaged.
    """
    damaged = list[DamagedFile]()
    try:
        pointer = _pointer(folder)
        names = [name for name in (pointer["state"], pointer["previous"]) if name]
    except FileNotFoundError as error:
        if not is_begun(folder):
            raise ProtocolError(
                f"There is no run to resume in {folder}: {error.filename} is missing."
            ) from error
        damaged.append(DamagedFile(folder / POINTER, "is missing"))
        names = [name_of(number) for number in _numbers(folder)]
    except DamagedFile as error:
        _refuse_another_version(folder)
        damaged.append(error)
        names = [name_of(number) for number in _numbers(folder)]
    for name in names:
        try:
            return Loaded(_verified(folder / name), tuple(damaged))
        except DamagedFile as error:
            damaged.append(error)
    said = "; ".join(f"{error.path.relative_to(folder)} {error.reason}" for error in damaged)
    raise ProtocolError(
        f"The run in {folder} cannot be resumed, as no checkpoint of it is whole: {said}. Restore "
        "these files from a copy, or start the run again in another folder; the adapters of its "
        "rounds can still be read."
    )


def is_begun(folder: Path) -> bool:
    """Whether there is a run in ``folder`` that has a checkpoint to go on from.

    A run that was killed before its first checkpoint was complete is begun anew.
    """
    return (folder / POINTER).exists() or any(_numbers(folder))


def journal_bytes(folder: Path) -> int:
    """How long the journal was at the last checkpoint of the run in ``folder``; 0 without one."""
    return load(folder).journal_bytes if is_begun(folder) else 0


def remark(folder: Path, point: Checkpoint, journal: Mark) -> Checkpoint:
    """The checkpoint with a journal that has been mended since."""
    path = folder / name_of(point.round) / MANIFEST
    content = read_sealed(path)
    write_sealed(path, {**content, **_marked(journal)})
    return replace(point, journal=journal)


def before(folder: Path, round: int) -> Checkpoint | None:
    """The checkpoint that is kept before that of a round; None if there is none, or a damaged one.

    Reads its files.
    """
    for number in _numbers(folder):
        if number < round:
            try:
                return _verified(folder / name_of(number))
            except DamagedFile:
                return None
    return None


def drop_damaged_before(folder: Path, round: int) -> list[DamagedFile]:
    """Remove the checkpoint that is kept before that of a round if it is damaged; why it was.

    Reads its files. The next checkpoint shares files with it.
    """
    for number in _numbers(folder):
        if number < round:
            try:
                _verified(folder / name_of(number))
            except DamagedFile as error:
                shutil.rmtree(folder / name_of(number))
                return [error]
            return []
    return []


def name_of(round: int) -> str:
    """The name of a checkpoint's folder."""
    return f"state-{round:05d}"


def _numbers(folder: Path) -> list[int]:
    """The rounds of all checkpoints in a folder, the newest first."""
    names = (_FOLDER.fullmatch(path.name) for path in folder.glob("state-*"))
    return sorted((int(name[1]) for name in names if name), reverse=True)


def _files(state: State) -> Iterator[tuple[str, Adapter]]:
    """Every adapter of a state with the name of its file."""
    yield "model.safetensors", state.model
    for number, adapter in enumerate(state.memory.values()):
        yield f"memory-{number}.safetensors", adapter
    for round, update in state.merge_log.updates.items():
        yield f"update-{round:05d}.safetensors", update


def _write(target: Path, adapter: Adapter, kept: Mapping[Path, Mapping[str, str]]) -> str:
    """Write an adapter of a state; its SHA-256. ``kept`` are the checkpoints on the disk.

    One that has not changed since the last checkpoint, such as an update in a log that only
    grows, is not encoded again. It is on the disk twice, as often as checkpoints are kept, so that
    one damaged file does not damage both: this checkpoint shares it with the one before the last.
    """
    source = wire.stored_at(adapter)
    digest = None if source is None else kept.get(source.parent, {}).get(source.name)
    if source is None or digest is None:
        data = wire.encode(adapter, {"kind": "state"}, torch.float32)
        write_atomically(target, data)
        return hashlib.sha256(data).hexdigest()
    for other, sums in kept.items():
        for name, same in sums.items() if other != source.parent else ():
            if same == digest and (other / name).exists():
                link_or_copy(other / name, target, digest)
                return digest
    copy_verified(source, target, digest)
    return digest


def _sums(state: Path) -> Mapping[str, str]:
    """The SHA-256 of the files of a checkpoint by name; nothing of a damaged one."""
    try:
        sums: Mapping[str, str] = read_sealed(state / MANIFEST)["files"]
    except (DamagedFile, OSError):
        return {}
    return sums


def _manifest(point: Checkpoint, sums: Mapping[str, str]) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "round": point.round,
        **_marked(point.journal),
        "identity": point.identity,
        "clients_at_once": point.clients_at_once,
        "accepted": dict(point.accepted),
        "files": dict(sums),
        "state": _described(point.state),
    }


def _marked(journal: Mark) -> dict[str, Any]:
    return {"journal_bytes": journal.bytes, "journal_sha256": journal.sha256}


def _described(state: State) -> dict[str, Any]:
    """All of a state that is not an adapter."""
    return {
        "memory": list(state.memory),
        "updates": list(state.merge_log.updates),
        "merged_until": dict(state.merge_log.merged_until),
        "per_module": {name: dict(values) for name, values in state.per_module.items()},
        "per_client": {name: dict(values) for name, values in state.per_client.items()},
    }


def _verified(state: Path) -> Checkpoint:
    """The checkpoint in a folder, every file of which is compared with its SHA-256.

    Raises:
        DamagedFile: one is not as it was written, or is missing.
        ProtocolError: it is of another version of flexlora.
    """
    content = _read(state / MANIFEST)
    if content["format"] != FORMAT:
        raise _other_version(state.parent, content["format"])
    if name_of(content["round"]) != state.name:
        raise DamagedFile(state / MANIFEST, f"is that of round {content['round']}")
    for name, digest in content["files"].items():
        if not (state / name).is_file():
            raise DamagedFile(state / name, "is missing")
        if sha256(state / name) != digest:
            raise DamagedFile(state / name, "does not agree with its checksum: it is damaged")
    return Checkpoint(
        content["round"],
        Mark(content["journal_bytes"], content["journal_sha256"]),
        _state(state, content),
        content["identity"],
        content["clients_at_once"],
        content["accepted"],
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_sealed(path)
    except FileNotFoundError as error:
        raise DamagedFile(path, "is missing") from error


def _pointer(folder: Path) -> dict[str, Any]:
    content = read_sealed(folder / POINTER)
    if content["format"] != FORMAT:
        raise _other_version(folder, content["format"])
    return content


def _refuse_another_version(folder: Path) -> None:
    """Refuse the pointer of an earlier version, which is JSON without a checksum."""
    try:
        content = json.loads((folder / POINTER).read_bytes())
    except (ValueError, OSError):
        return
    if isinstance(content, dict) and "sha256" not in content and "round" in content:
        written = content.get("format", 1)
        if written != FORMAT:
            raise _other_version(folder, written)


def _other_version(folder: Path, written: object) -> ProtocolError:
    return ProtocolError(
        f"The run in {folder} was written by another version of flexlora (checkpoint format "
        f"{written}, this version has {FORMAT}). Finish it with the version that began it, or "
        f"start it again in another folder; its adapters and its journal can still be read."
    )


def _state(folder: Path, content: Mapping[str, Any]) -> State:
    """The state that a manifest describes, its adapters read from the disk."""
    described = content["state"]

    def adapter(file: str) -> Adapter:
        return wire.open_file(folder / file)[0]

    names, updates = described["memory"], described["updates"]
    return State(
        adapter("model.safetensors"),
        {name: adapter(f"memory-{n}.safetensors") for n, name in enumerate(names)},
        described["per_module"],
        described["per_client"],
        MergeLog(
            {round: adapter(f"update-{round:05d}.safetensors") for round in updates},
            described["merged_until"],
        ),
    )
