"""The asking of one round: who is asked, again if need be, and what comes back of use."""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from flexlora import wire
from flexlora.errors import FlexloraError, ProtocolError
from flexlora.federation import checkpoint, sampling
from flexlora.federation.client_turn import FACTS, TurnRequest
from flexlora.federation.setup import PreparedRun
from flexlora.federation.transport import (
    LateReply,
    Lost,
    Reply,
    Transport,
    TransportEvent,
    WaitPolicy,
)
from flexlora.journal import Event, Record
from flexlora.method import Draw, State, Upload, averaging
from flexlora.seeds import rng
from flexlora.wire import validate


@dataclass
class Collector:
    """The asking of one round: who was asked, and what came back that is of use."""

    ready: PreparedRun
    federation: Transport
    number: int
    state: State
    spool: Path
    asked: set[str] = field(default_factory=set)
    uploads: dict[str, Upload] = field(default_factory=dict)

    @property
    def wanted(self) -> int:
        """How many uploads the round goes on with at once."""
        return min(self.ready.cohort_size, len(self.ready.clients))

    def events(self, record: Record) -> Iterator[Event]:
        """Ask until the quorum is there, or nothing is left to try; what happened.

        Raises:
            ProtocolError: too few clients returned a usable upload.
        """
        how = self.ready.experiment.federation
        for attempt in range(1, how.attempts + 1):
            for found in self._received(self._cohort(attempt)):
                yield self._recorded(found, record)
            if len(self.uploads) >= how.quorum:
                return
            if how.attempts > 1:
                facts = {"received": len(self.uploads), "quorum": how.quorum}
                yield record.append("short", round=self.number, attempt=attempt, **facts)
        raise ProtocolError(
            f"{len(self.uploads)} of {len(self.asked)} clients of round {self.number} returned a "
            f"usable upload after {how.attempts} attempts; federation.quorum is {how.quorum}. "
            f"Asked: {sorted(self.asked)[:20]}. Their reasons are in the journal; go on by "
            "resuming the run."
        )

    def _recorded(self, found: Upload | Lost | LateReply | TransportEvent, record: Record) -> Event:
        if isinstance(found, Upload):
            self.uploads[found.client] = found
            return record.append("client", **facts_of(found, self.ready))
        if isinstance(found, TransportEvent):
            return record.append(found.event, round=self.number, **found.facts)
        if isinstance(found, Lost) and found.forgot:
            self.state = averaging.forgotten(self.state, found.client)
        kind = "lost" if isinstance(found, Lost) else "stray"
        return record.append(kind, round=self.number, client=found.client, reason=found.reason)

    def _cohort(self, attempt: int) -> list[str]:
        """Whom an attempt asks, in the clients' order: of those present that have not answered."""
        how = self.ready.experiment.federation
        present = self.federation.present(list(self.ready.clients))
        open_ = [id for id in present if id not in self.uploads]
        # As many more as the share says, without losing a client to rounding.
        size = math.ceil((self.wanted - len(self.uploads)) * (1 + how.over_selection) - 1e-9)
        again = (attempt,) if attempt > 1 else ()
        draw = rng(self.ready.experiment.seed, "cohort", self.number, *again)
        cohort = sampling.cohort(open_, size, draw) if open_ else []
        self.asked |= set(cohort)
        return cohort

    def _received(self, cohort: list[str]) -> Iterator[Upload | Lost | LateReply | TransportEvent]:
        """The uploads of a cohort: those already on the disk, then the others' as they come.

        Every upload is written to the disk before it is looked at, so that none is trained
        twice after a crash and none is held in memory.
        """
        waiting: list[str] = []
        # The longest first: with several at work, none is left for the end alone.
        order = sorted(cohort, key=lambda id: (-self.ready.clients[id].examples, id))
        for start in range(0, len(order), self.federation.together):
            group = order[start : start + self.federation.together]
            if all(self._place(id).exists() for id in group):
                yield from map(self._checked, group)
            else:
                # Together or not at all: numbers of clients trained together differ by rounding
                # from those trained in other company, and a resumed run is the same to the bit.
                waiting += group

        seconds = self.ready.experiment.federation.deadline_seconds
        asked = jobs(self.ready, self.number, self.state, tuple(waiting), self.spool / "downloads")
        for reply in self.federation.exchange(asked, WaitPolicy(seconds, self._enough)):
            if isinstance(reply, LateReply | TransportEvent):
                yield reply
            elif reply.client not in waiting:
                yield LateReply(reply.client, "It was not asked, or had answered already.")
            else:
                waiting.remove(reply.client)
                yield reply if isinstance(reply, Lost) else self._kept(reply)
        why = "It was not needed any more." if self._enough() else "It did not answer."
        yield from (Lost(id, why) for id in waiting)

    def _enough(self) -> bool:
        return len(self.uploads) >= self.wanted

    def _kept(self, reply: Reply) -> Upload | Lost:
        checkpoint.write(self._place(reply.client), reply.data)
        return self._checked(reply.client)

    def _place(self, id: str) -> Path:
        # A client's name may be anything; its hash is a file name everywhere.
        return self.spool / f"{hashlib.sha256(id.encode()).hexdigest()[:32]}.safetensors"

    def _checked(self, id: str) -> Upload | Lost:
        """A client's upload, if it is what was asked for; a client that sent else is lost."""
        ready, path = self.ready, self._place(id)
        client = ready.clients[id]
        # Outside the try: a fault of the method must not look like one of the client.
        expected = ready.method.expects(self.state, client, ready.shapes)
        try:
            upload = wire.open_upload(path)
            validate.upload(upload, client, self.number, expected, client.examples)
            if missing := [name for name in FACTS if name not in upload.facts]:
                raise ProtocolError(f"The upload of client {id!r} does not say its {missing}.")
        except FlexloraError as error:
            path.unlink()
            return Lost(id, str(error))
        return replace(upload, facts={**upload.facts, "bytes_up": path.stat().st_size})


def jobs(
    ready: PreparedRun, number: int, state: State, clients: Sequence[str], folder: Path
) -> Iterator[TurnRequest]:
    """The jobs of these clients, made one at a time, when they are asked for.

    Where a method hands out by rank alone, a download is made once for all clients of the
    same ranks and lies on the disk.
    """

    def made(id: str) -> bytes:
        client = ready.clients[id]
        download = ready.method.handout(state, client, draw(ready, number))
        download = replace(download, held=averaging.held(state, client))
        return wire.encode_download(download, ready.wire_dtype, ready.method.sparse)

    if not ready.method.by_rank_alone:
        yield from (TurnRequest(id, number, made(id)) for id in clients)
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    files: dict[str, Path] = {}
    for id in clients:
        kind = ready.clients[id].rank_type
        if kind not in files:
            files[kind] = folder / f"{len(files)}.safetensors"
            files[kind].write_bytes(made(id))
        yield TurnRequest(id, number, files[kind])


def draw(ready: PreparedRun, number: int) -> Draw:
    """The randomness of a round's handouts."""
    return lambda name: rng(ready.experiment.seed, "handout", number, name)


def facts_of(upload: Upload, ready: PreparedRun) -> dict[str, Any]:
    """What the journal says of a client's turn."""
    facts = {name: upload.facts[name] for name in (*FACTS, "bytes_up")}
    return {
        "round": upload.round,
        "client": upload.client,
        "rank_type": ready.clients[upload.client].rank_type,
        "examples": upload.examples,
        **facts,
    }
