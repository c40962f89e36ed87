"""What a client keeps between rounds, on its own disk: base updates and private adapters."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile

import torch

from flexlora import wire
from flexlora.errors import FlexloraError
from flexlora.lowrank import Adapter

PRIVATE = "private"
"""Where in a run's folder the simulated clients keep what never travels."""


class LostBase(FlexloraError):
    """A client has lost updates that it had merged, so that its base is not the one it must be."""


@dataclass(frozen=True)
class ClientStore:
    """Files in ``folder``, each named by the round it is of, so that a round may be repeated.

    In a simulation all clients share one folder and, as every download brings its client up
    to date, the same base updates.
    """

    folder: Path

    def add_updates(self, updates: Mapping[int, Adapter], expected: Sequence[int] = ()) -> None:
        """Store the updates of a download, to be merged into the base for good.

        Raises:
            LostBase: the update of one of the ``expected`` rounds should be here, and is not.
        """
        if lost := [round for round in expected if not self._is_sound(self._update_file(round))]:
            raise LostBase(
                f"The base updates of rounds {lost} are not complete in {self.folder}; the server "
                "must send them once more."
            )
        for round, adapter in updates.items():
            path = self._update_file(round)
            # An update is only ever sent once its round is in a checkpoint: it is final.
            if not path.exists():
                self._write(path, wire.encode(adapter, {"kind": "private"}, torch.float32))

    def updates_before(self, round: int) -> list[Adapter]:
        """All updates that the base of ``round`` has merged, the oldest first."""
        files = sorted((self.folder / "merged").glob("*.safetensors"))
        return [wire.open_file(path)[0] for path in files if int(path.stem) < round]

    def keep(self, client: str, round: int, adapters: Mapping[str, Adapter]) -> None:
        """Store a client's private adapters; those older than its last round are removed."""
        for old in self._private_files(client, round)[:-1]:
            old.unlink()
        path = self._private_folder(client) / f"{round:05d}.safetensors"
        self._write(path, wire.encode_private(adapters))

    def private(self, client: str, round: int) -> dict[str, Adapter]:
        """What a client kept of its last round before ``round``, by name."""
        files = self._private_files(client, round)
        return wire.open_private(files[-1]) if files else {}

    def _is_sound(self, path: Path) -> bool:
        """Whether a file exists and can be read; one that cannot is removed."""
        if not path.exists():
            return False
        try:
            wire.open_file(path)
        except FlexloraError:
            path.unlink()
            return False
        return True

    def _update_file(self, round: int) -> Path:
        return self.folder / "merged" / f"{round:05d}.safetensors"

    def _private_folder(self, client: str) -> Path:
        return self.folder / "kept" / file_name(client)

    def _private_files(self, client: str, round: int) -> list[Path]:
        files = sorted(self._private_folder(client).glob("*.safetensors"))
        return [path for path in files if int(path.stem) < round]

    def _write(self, path: Path, data: bytes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A draft of its own, as several processes may store the same update.
        with NamedTemporaryFile(dir=path.parent, prefix=".", delete=False) as draft:
            draft.write(data)
        Path(draft.name).replace(path)


def file_name(client: str) -> str:
    """A file name for a client, whose own name may be anything; the same everywhere."""
    return hashlib.sha256(client.encode()).hexdigest()[:32]
