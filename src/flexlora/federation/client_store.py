"""What a client keeps between rounds, on its own disk: base updates and private adapters."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from flexlora import wire
from flexlora.errors import FlexloraError, ProtocolError
from flexlora.lowrank import Adapter
from flexlora.storage import (
    SUM,
    DamagedFile,
    is_intact,
    make_private,
    remove_summed,
    sum_file,
    sum_of,
    write_summed,
)
from flexlora.storage.untrusted import short

Shapes = Mapping[str, tuple[int, int]]
"""The shape (out, in) of every adapted module of the base model."""

PRIVATE = "private"
"""Where in a run's folder the simulated clients keep what never travels."""


_NAME = re.compile(r"\d{5,}\.safetensors")


class LostBase(FlexloraError):
    """A client has lost updates that it had merged, so that its base is not the one it must be."""


@dataclass(frozen=True)
class ClientStore:
    """Files in ``folder``, each named by the round it is of, so that a round may be repeated.

    Each has its SHA-256 beside it, with which it is compared before it is first used.

    In a simulation all clients share one folder (``shared``) and, as every download brings its
    client up to date, the same base updates.
    """

    folder: Path
    shared: bool = False
    _intact: dict[Path, tuple[int, ...]] = field(
        default_factory=dict, init=False, compare=False, repr=False
    )

    def add_updates(
        self,
        updates: Mapping[int, Adapter],
        expected: Sequence[int] = (),
        shapes: Shapes | None = None,
    ) -> None:
        """Store the updates of a download, to be merged into the base for good.

        All of them are checked before one is kept; ``shapes`` are those of the base model's
        modules, None if they have been compared already.

        Raises:
            LostBase: the update of one of the ``expected`` rounds should be here, and is not.
            ProtocolError: an update does not fit the base model, or is not finite.
        """
        if lost := [round for round in expected if not self._is_sound(self._update_file(round))]:
            raise self._lost(lost)
        for round, adapter in updates.items():
            _check_update(adapter, shapes, f"The update of the base model of round {round}")
        for round, adapter in updates.items():
            path = self._update_file(round)
            if self.shared and self._is_intact(path):
                continue
            # A server that lost its last checkpoint has run the round again, perhaps with others:
            # then this update is another one than the file.
            data = wire.encode(adapter, {"kind": "private"}, torch.float32)
            if not self._is_intact(path) or sum_of(path) != hashlib.sha256(data).hexdigest():
                self._write(path, data)

    def discard_unfit(self, shapes: Shapes) -> list[Path]:
        """Remove kept updates that do not fit the base model or are not finite; returns which.

        The server sends them again. Reads every update once.
        """
        unfit = []
        for path in _numbered(self.folder / "merged"):
            try:
                _check_update(wire.open_file(path)[0], shapes, str(path))
            except FlexloraError:
                remove_summed(path)
                unfit.append(path)
        return unfit

    def update_bytes(self) -> dict[int, int]:
        """The sizes in bytes of the kept updates, by round."""
        files = _numbered(self.folder / "merged")
        return {int(path.stem): path.stat().st_size for path in files if path.exists()}

    def restore_updates(self, updates: Mapping[int, Adapter], wire_dtype: torch.dtype) -> None:
        """Let the updates that were merged be these again, as they travelled in this dtype.

        Those that are damaged or missing are written, and others removed. Nothing happens where
        none was merged.
        """
        if not (self.folder / "merged").is_dir():
            return
        files = {self._update_file(round): adapter for round, adapter in updates.items()}
        for path in _numbered(self.folder / "merged"):
            if path not in files:
                remove_summed(path)
        for path, adapter in files.items():
            if not self._is_sound(path):
                self.add_updates({int(path.stem): adapter.to(wire_dtype)})

    def updates_before(self, round: int) -> list[Adapter]:
        """All updates that the base of ``round`` has merged, the oldest first.

        Raises:
            LostBase: one of them is damaged.
        """
        files = [path for path in _numbered(self.folder / "merged") if int(path.stem) < round]
        if lost := [int(path.stem) for path in files if not self._is_sound(path)]:
            raise self._lost(lost)
        return [wire.open_file(path)[0] for path in files]

    def keep(self, client: str, round: int, adapters: Mapping[str, Adapter]) -> None:
        """Store a client's private adapters; those older than its last round are removed."""
        for old in self._private_files(client, round)[:-1]:
            remove_summed(old)
        path = self._private_folder(client) / f"{round:05d}.safetensors"
        self._write(path, wire.encode_private(adapters))

    def private(self, client: str, round: int) -> dict[str, Adapter]:
        """What a client kept of its last round before ``round``, by name.

        Raises:
            DamagedFile: it is not as it was written.
        """
        files = self._private_files(client, round)
        if not files:
            return {}
        if not self._is_intact(files[-1]):
            raise _damaged(files[-1])
        return wire.open_private(files[-1])

    def damaged(self, round: int) -> list[DamagedFile]:
        """Which files that clients kept in this round are not as they were written."""
        name = f"{round:05d}.safetensors"
        folders = sorted((self.folder / "kept").glob("*"))
        files = (path / name for path in folders)
        return [
            _damaged(file)
            for file in files
            if (file.exists() or sum_file(file).exists()) and not self._is_intact(file)
        ]

    def _is_sound(self, path: Path) -> bool:
        """Whether a file exists and is as it was written; one that is not is removed."""
        if self._is_intact(path):
            return True
        remove_summed(path)
        return False

    def _is_intact(self, path: Path) -> bool:
        """Whether a file is as it was written; reads it only if this was not known of it."""
        if path.exists() and self._intact.get(path) == _stamp(path):
            return True
        if not is_intact(path):
            return False
        self._intact[path] = _stamp(path)
        return True

    def _lost(self, rounds: Sequence[int]) -> LostBase:
        return LostBase(
            f"The base updates of rounds {list(rounds)} are not complete in {self.folder}; the "
            "server must send them once more."
        )

    def _update_file(self, round: int) -> Path:
        return self.folder / "merged" / f"{round:05d}.safetensors"

    def _private_folder(self, client: str) -> Path:
        return self.folder / "kept" / file_name(client)

    def _private_files(self, client: str, round: int) -> list[Path]:
        files = _numbered(self._private_folder(client))
        return [path for path in files if int(path.stem) < round]

    def _write(self, path: Path, data: bytes) -> None:
        for place in (self.folder, path.parent.parent, path.parent):
            make_private(place)
        write_summed(path, data)
        self._intact[path] = _stamp(path)


def _check_update(adapter: Adapter, shapes: Shapes | None, place: str) -> None:
    """Refuse an update that cannot be added to the base model.

    Raises:
        ProtocolError: with the module.
    """
    for module, factors in adapter.items():
        if shapes is not None and factors.shape != shapes.get(module):
            raise ProtocolError(
                f"{place} has {short(module)} of shape {factors.shape} (out, in); in the base "
                f"model it is {shapes.get(module)}."
            )
        if not (factors.B.isfinite().all() and factors.A.isfinite().all()):
            raise ProtocolError(f"{place} has NaN or infinity in {short(module)}.")


def _stamp(path: Path) -> tuple[int, ...]:
    """What changes when a file does."""
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _numbered(folder: Path) -> list[Path]:
    """The files of rounds in a folder, in their order; also one of which only the sum is left."""
    names = {path.name.removesuffix(SUM) for path in folder.glob("*.safetensors*")}
    return sorted(folder / name for name in names if _NAME.fullmatch(name))


def _damaged(path: Path) -> DamagedFile:
    reason = "is missing" if not path.exists() else "does not agree with its checksum"
    remedy = (
        "it is what a client has trained and never sends; restore it from a copy, or remove it and "
        f"{path.name}{SUM}, and this client trains that part anew"
    )
    return DamagedFile(path, reason, remedy)


def file_name(client: str) -> str:
    """A file name for a client, whose own name may be anything; the same everywhere."""
    return hashlib.sha256(client.encode()).hexdigest()[:32]
