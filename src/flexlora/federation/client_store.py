"""What a client keeps to itself between rounds, on its own disk: merged updates, private halves."""

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


class Forgotten(FlexloraError):
    """A client has lost what it had merged, so that its base is not the one it should be."""


@dataclass(frozen=True)
class ClientStore:
    """Files in ``folder``, each named by the round it is of, so that a round may be repeated.

    In a simulation all clients share one folder and, as every download brings its client up
    to date, the same merged updates.
    """

    folder: Path

    def merge(self, entries: Mapping[int, Adapter], held: Sequence[int] = ()) -> None:
        """Keep what a download says to merge into the base for good.

        Raises:
            Forgotten: by the download the entries of rounds ``held`` are here, and one is not.
        """
        if lost := [round for round in held if not self._has(round)]:
            raise Forgotten(
                f"What was merged in rounds {lost} is no longer whole in {self.folder}; the server "
                "must hand it out once more."
            )
        for round, adapter in entries.items():
            path = self._entry(round)
            # An entry is only ever handed out once its round is in a checkpoint: it is final.
            if not path.exists():
                self._write(path, adapter)

    def _has(self, round: int) -> bool:
        """Whether an entry is here and can be read; what cannot is removed."""
        path = self._entry(round)
        if not path.exists():
            return False
        try:
            wire.open_file(path)
        except FlexloraError:
            path.unlink()
            return False
        return True

    def _entry(self, round: int) -> Path:
        return self.folder / "merged" / f"{round:05d}.safetensors"

    def merged(self, round: int) -> list[Adapter]:
        """All that the base of ``round`` has merged, the oldest first."""
        found = sorted((self.folder / "merged").glob("*.safetensors"))
        return [wire.open_file(path)[0] for path in found if int(path.stem) < round]

    def keep(self, client: str, round: int, adapter: Adapter) -> None:
        """Keep a client's own adapter after its turn; older ones than its last are forgotten."""
        place = self._of(client)
        for old in self._before(client, round)[:-1]:
            old.unlink()
        self._write(place / f"{round:05d}.safetensors", adapter)

    def kept(self, client: str, round: int) -> Adapter | None:
        """What a client kept of its last turn before ``round``."""
        found = self._before(client, round)
        return wire.open_file(found[-1])[0] if found else None

    def _of(self, client: str) -> Path:
        # A client's name may be anything; its hash is a file name everywhere.
        return self.folder / "kept" / hashlib.sha256(client.encode()).hexdigest()[:32]

    def _before(self, client: str, round: int) -> list[Path]:
        found = sorted(self._of(client).glob("*.safetensors"))
        return [path for path in found if int(path.stem) < round]

    def _write(self, path: Path, adapter: Adapter) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A draft of its own, as several processes may merge the same entry.
        with NamedTemporaryFile(dir=path.parent, prefix=".", delete=False) as draft:
            draft.write(wire.encode(adapter, {"kind": "private"}, torch.float32))
        Path(draft.name).replace(path)
