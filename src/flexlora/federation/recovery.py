"""How a run goes on: from its last checkpoint that is whole, with a journal that agrees with it.

What is damaged is named in the journal, for good, and nothing else of the damage remains: a round
that was lost with a checkpoint is run again, and ends in the same bytes.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flexlora.federation import checkpoint
from flexlora.federation.checkpoint import Checkpoint
from flexlora.federation.client_store import PRIVATE, ClientStore
from flexlora.journal import JOURNAL, Event, Record, SampleAnswers, counted
from flexlora.storage import DamagedFile


@dataclass(frozen=True)
class Resumed:
    """Where a run goes on, and an event for everything in its folder that was damaged."""

    point: Checkpoint
    damaged: tuple[Event, ...]


def resume(folder: Path) -> Resumed:
    """The checkpoint from which the run in ``folder`` goes on, the events after it removed.

    The first process that looks at a damaged run mends it; for the next there is nothing to do.
    Nobody else may write in the folder. A kill at any moment leaves a run that can be resumed.

    Raises:
        ProtocolError: there is no run, it is of another version, or no checkpoint is whole.
    """
    loaded = checkpoint.load_sound(folder)
    point, found = _with_private_files(folder, loaded.point, loaded.damaged)
    found = [*found, *checkpoint.drop_damaged_before(folder, point.round)]
    record, events = Record(folder), list[Event]()
    says = [(error, _goes_on(folder, error, point)) for error in found]
    if record.agrees(point.journal):
        record.rewind(point.journal_bytes)
    else:
        aside = folder / f"damaged-{point.round:05d}-{JOURNAL}"
        record.mend(point.journal_bytes, point.round, aside)
        reason = f"is damaged or cut off; what cannot be read of it is in {aside.name} only"
        text = f"{JOURNAL} {reason}. The adapters are not affected."
        says.append((DamagedFile(record.path, reason), text))
    if lines := SampleAnswers(folder).rewind(point.round):
        path = SampleAnswers(folder).path
        reason = f"had {counted(lines, 'damaged line')}"
        says.append((DamagedFile(path, reason), f"{path.name} {reason}, which are removed."))
    for error, text in says:
        file = error.path.relative_to(folder).as_posix()
        events.append(record.append("damaged", round=point.round, file=file, reason=text))
    if says:
        point = checkpoint.remark(folder, point, record.mark())
    checkpoint.point_at(folder, point.round)
    _remove_leftovers(folder, point.round)
    return Resumed(point, tuple(events))


def _with_private_files(
    folder: Path, point: Checkpoint, damaged: Sequence[DamagedFile]
) -> tuple[Checkpoint, Sequence[DamagedFile]]:
    """The checkpoint at which the simulated clients' own files are whole too.

    Their files of the last round can be made again, by running it again. Updates that they have
    merged are in the server's state as well.
    """
    found = ClientStore(folder / PRIVATE).damaged(point.round)
    if not found:
        return point, damaged
    before = checkpoint.before(folder, point.round)
    if before is None:
        raise found[0]
    return before, [*damaged, *found]


def _goes_on(folder: Path, error: DamagedFile, point: Checkpoint) -> str:
    """What is damaged and what follows from it, in a sentence."""
    return (
        f"{error.path.relative_to(folder).as_posix()} {error.reason}. The run goes on from its "
        f"checkpoint after round {point.round}."
    )


def _remove_leftovers(folder: Path, round: int) -> None:
    """Remove what a kill left behind: uploads of other rounds than the next, unfinished files.

    Uploads of a later round were made from a state that is no longer there.
    """
    for spool in folder.glob("uploads-*"):
        if spool.name != spool_name(round + 1):
            shutil.rmtree(spool)
    for place in ("", "rounds/*/", "uploads-*/", f"{PRIVATE}/*/", f"{PRIVATE}/*/*/"):
        for pattern in (".*.partial*", ".*.old"):
            for path in folder.glob(place + pattern):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def spool_name(round: int) -> str:
    """The name of the folder with the uploads of a round."""
    return f"uploads-{round:05d}"
