"""One round's uploads: which clients are sent a request, and which replies are usable."""

from __future__ import annotations

import math
import shutil
import traceback
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from flexlora import wire
from flexlora.errors import FlexloraError, ProtocolError
from flexlora.federation import sampling
from flexlora.federation.client_store import file_name
from flexlora.federation.client_turn import METRICS, TurnRequest
from flexlora.federation.influence.bounds import Accepted
from flexlora.federation.influence.measure import download_file
from flexlora.federation.influence.screen import Screen
from flexlora.federation.prepared import PreparedRun
from flexlora.federation.transport import (
    LateReply,
    Lost,
    Reply,
    Transport,
    TransportEvent,
    WaitPolicy,
)
from flexlora.journal import Event, LossKind, Record
from flexlora.method import Feature, State, Upload
from flexlora.seeds import rng
from flexlora.storage import is_intact, remove_summed, sum_file, write_new, write_summed
from flexlora.storage.untrusted import RefusalCode, short
from flexlora.wire import validate

MOST_NATS = 1000.0
"""Of a token's loss, on average: some hundred times that of guessing among 100,000 tokens."""

MOST_SECONDS = 30 * 86400.0
MOST_BYTES = 2**50
"""Of a download; what was sent is counted where it was sent."""


@dataclass
class Collector:
    """The collection of one round's uploads.

    ``invited`` are the clients that were sent a request, ``uploads`` the usable replies and
    ``bytes_down`` the sizes of what was sent, by client. ``lost_base`` are clients whose base
    updates are gone. ``earlier`` are the changes of earlier rounds, which the ``screen`` compares
    uploads with.
    """

    prepared: PreparedRun
    transport: Transport
    number: int
    state: State
    spool: Path
    invited: set[str] = field(default_factory=set)
    uploads: dict[str, Upload] = field(default_factory=dict)
    bytes_down: dict[str, int] = field(default_factory=dict)
    lost_base: set[str] = field(default_factory=set)
    last_reason: str = ""
    earlier: Accepted = field(default_factory=Accepted)
    screen: Screen = field(init=False)

    def __post_init__(self) -> None:
        # Downloads of a process that was killed may be incomplete.
        shutil.rmtree(self._downloads, ignore_errors=True)
        self.screen = Screen(
            self.prepared, self.number, self.earlier, self.spool / "clipped", self._downloads
        )

    @property
    def wanted(self) -> int:
        """With how many uploads the round goes on at once."""
        return min(self.prepared.cohort_size, len(self.prepared.clients))

    def events(self, record: Record) -> Iterator[Event]:
        """Collect until the quorum is there, or no attempt is left; yields what happened.

        Raises:
            ProtocolError: too few clients returned a usable upload.
        """
        settings = self.prepared.experiment.federation
        for attempt in range(1, settings.attempts + 1):
            for outcome in self._received(self._cohort(attempt)):
                yield self._recorded(outcome, record)
            for id, reason in self.screen.refused(self.uploads).items():
                del self.uploads[id]
                remove_summed(self._file(id))
                kind, code = LossKind.TOO_LARGE_CHANGE, RefusalCode.TOO_LARGE_CHANGE
                yield self._recorded(Lost(id, reason, kind, code=code), record)
            if len(self.uploads) >= settings.quorum and not self._absent():
                yield from self._clipped(record)
                return
            if settings.attempts > 1:
                counts = {"received": len(self.uploads), "quorum": settings.quorum}
                yield record.append("short", round=self.number, attempt=attempt, **counts)
        reason = f" The last one: {self.last_reason}" if self.last_reason else ""
        if absent := self._absent():
            reason = f" None came from {absent}, without which the averager does nothing.{reason}"
        raise ProtocolError(
            f"{len(self.uploads)} of {len(self.invited)} clients of round {self.number} returned a "
            f"usable upload after {settings.attempts} attempts; federation.quorum is "
            f"{settings.quorum}. Requests went to {sorted(self.invited)[:20]}; the journal has the "
            f"reason for each.{reason} Resume with: flexlora run --resume {record.folder}"
        )

    def remaining(self, state: State) -> State:
        """The state in which clients that lost their base have merged nothing."""
        log = state.merge_log
        for client in sorted(self.lost_base):
            log = log.forget(client)
        return replace(state, merge_log=log)

    def _recorded(
        self, outcome: Upload | Lost | LateReply | TransportEvent, record: Record
    ) -> Event:
        if isinstance(outcome, Upload):
            outcome = self._measured(outcome)
        if isinstance(outcome, Upload):
            self.uploads[outcome.client] = outcome
            return record.append("client", **client_facts(outcome, self.prepared))
        if isinstance(outcome, TransportEvent | LateReply):
            return recorded(outcome, self.number, record)
        facts = {"round": self.number, "client": outcome.client, "reason": outcome.reason}
        self.last_reason = outcome.reason
        if outcome.lost_base:
            self.lost_base.add(outcome.client)
            self.state = self.remaining(self.state)
        if outcome.code:
            facts["code"] = outcome.code
        return record.append("lost", **facts, kind=outcome.kind)

    def _measured(self, upload: Upload) -> Upload | Lost:
        """The upload, if it can be compared with others; else the client is lost."""
        try:
            self.screen.measure(upload, self.state)
        except wire.RefusedMessage as error:
            remove_summed(self._file(upload.client))
            return _invalid(upload.client, str(error), error.code)
        return upload

    def _clipped(self, record: Record) -> Iterator[Event]:
        """Scale down the uploads that change too much, once it is known who takes part."""
        for clip in self.screen.clip(self.uploads, self.state):
            id = clip.upload.client
            self.uploads[id] = clip.upload
            facts = {"round": self.number, "client": id}
            yield record.append("clipped", **facts, ratio=clip.ratio, share=clip.share)

    @property
    def _downloads(self) -> Path:
        return self.spool / "downloads"

    def _cohort(self, attempt: int) -> list[str]:
        """The clients of an attempt, in the clients' order: present, and without an upload yet."""
        settings, seed = self.prepared.experiment.federation, self.prepared.experiment.seed
        present = self.transport.present(list(self.prepared.clients))
        missing = [id for id in present if id not in self.uploads]
        # As many more as the share says, without losing a client to rounding.
        size = math.ceil((self.wanted - len(self.uploads)) * (1 + settings.over_selection) - 1e-9)
        address = (attempt,) if attempt > 1 else ()
        generator = rng(seed, "cohort", self.number, *address)
        first, others = self._absent(missing), missing
        if first:
            others = [id for id in missing if id not in first]
        size = max(size - len(first), 0)
        is_drawn = others and (size or not first)
        drawn = sampling.cohort(others, size, generator) if is_drawn else []
        cohort = [id for id in missing if id in first or id in drawn] if first else drawn
        self.invited |= set(cohort)
        return cohort

    def _received(self, cohort: list[str]) -> Iterator[Upload | Lost | LateReply | TransportEvent]:
        """The uploads of a cohort: those already on the disk, then the others' as they come.

        Every upload is written to the disk before it is looked at, so that none is trained
        twice after a crash and none is held in memory.
        """
        waiting: list[str] = []
        stored: list[str] = []
        at_once = self.transport.clients_at_once
        yield from filter(None, map(self._damage, cohort))
        # The longest first: with several at work, none is left for the end by itself.
        order = sorted(cohort, key=lambda id: (-self.prepared.clients[id].examples, id))
        for start in range(0, len(order), at_once):
            group = order[start : start + at_once]
            # Together or not at all: numbers of clients trained together differ by rounding
            # from those trained in other company, and a resumed run is the same to the bit.
            (stored if all(self._file(id).exists() for id in group) else waiting).extend(group)

        deque(self._counted(stored), maxlen=0)  # their downloads once more, for the sizes
        yield from map(self._checked, stored)
        requests = self._counted(waiting)
        seconds = self.prepared.experiment.federation.deadline_seconds
        policy = WaitPolicy(seconds, self._has_enough)
        for reply in self.transport.exchange(requests, policy):
            if isinstance(reply, LateReply | TransportEvent):
                yield reply
            elif reply.client not in waiting:
                yield LateReply(reply.client, "It had no open request.")
            else:
                waiting.remove(reply.client)
                yield reply if isinstance(reply, Lost) else self._stored(reply)
        if self._has_enough():
            reason, kind = "Enough uploads had arrived without its own.", LossKind.NOT_NEEDED
        else:
            reason, kind = "It did not answer in time.", LossKind.NO_ANSWER
        yield from (Lost(id, reason, kind) for id in waiting)

    def _counted(self, clients: Sequence[str]) -> Iterator[TurnRequest]:
        """The requests to these clients, their downloads counted as they are made."""
        folder = self.spool / "downloads"
        for request in turn_requests(self.prepared, self.number, self.state, clients, folder):
            self.bytes_down[request.client] = request.bytes_down
            yield request

    def _has_enough(self) -> bool:
        return len(self.uploads) >= self.wanted and not self._absent()

    def _absent(self, among: Collection[str] | None = None) -> list[str]:
        """The clients without an upload that the averager cannot do without."""
        required = self.prepared.averager.required - self.uploads.keys()
        return sorted(required if among is None else required.intersection(among))

    def _stored(self, reply: Reply) -> Upload | Lost:
        most, size = wire.most_upload_bytes(self._expected(reply.client)), len(reply.data)
        if size > most:
            reason = f"Its upload has {size} bytes, and at most {most} are expected; not stored."
            return _invalid(reply.client, reason, RefusalCode.WRONG_SIZE)
        write_summed(self._file(reply.client), reply.data)
        return self._checked(reply.client)

    def _damage(self, client: str) -> TransportEvent | None:
        """Remove a client's upload that is not as it was written; the client is asked again.

        One without a sum was not written whole before a kill.
        """
        path = self._file(client)
        if not path.exists() or is_intact(path):
            return None
        is_damaged = sum_file(path).exists()
        remove_summed(path)
        file = f"{self.spool.name}/{path.name}"
        reason = f"{file}, the upload of client {client!r}, is damaged; the client is asked again."
        return TransportEvent("damaged", {"file": file, "reason": reason}) if is_damaged else None

    def _file(self, client: str) -> Path:
        return self.spool / f"{file_name(client)}.safetensors"

    def _expected(self, client: str) -> wire.ExpectedUpload:
        return expected_upload(self.prepared, self.number, self.state, client)

    def _checked(self, id: str) -> Upload | Lost:
        """A client's upload, if it is what the round expects; else the client is lost.

        Here alone every exception counts as a fault of the upload: whatever the bytes of a
        stranger lead to, the round goes on and the file is removed, so that no later start meets
        it. An exception that no check foresees is a bug all the same: its traceback is printed,
        and the code in the journal is ``unexpected``. Afterwards only the disk can fail a read.
        """
        path = self._file(id)
        # Outside the try: a fault of the method must not look like one of the client.
        expected = self._expected(id)
        try:
            upload = wire.open_upload(path, expected)
            validate.values(upload, expected.place)
            known = {"bytes_up": path.stat().st_size}
        except Exception as error:
            remove_summed(path)
            return _invalid(id, *_reason(error))
        if id in self.bytes_down:
            known["bytes_down"] = self.bytes_down[id]
        return replace(upload, metrics={**upload.metrics, **known})


def _invalid(client: str, reason: str, code: RefusalCode) -> Lost:
    return Lost(client, reason, LossKind.INVALID_UPLOAD, code=code)


def _reason(error: Exception) -> tuple[str, RefusalCode]:
    """Why an upload is not used, for people and for programs."""
    match error:
        case wire.RefusedMessage():
            return str(error), error.code
        case OSError() | FlexloraError():
            reason = f"Its upload could not be read from the disk: {short(error)}."
            return reason, RefusalCode.UNREADABLE
        case _:
            traceback.print_exception(error)
            name = type(error).__name__
            reason = f"Its upload led to {name}: {short(error)}. Please report this error."
            return reason, RefusalCode.UNEXPECTED


def recorded(outcome: TransportEvent | LateReply, number: int, record: Record) -> Event:
    """Write down what happened in a round beside its uploads."""
    if isinstance(outcome, TransportEvent):
        return record.append(outcome.event, round=number, **outcome.facts)
    facts = {"client": outcome.client, "reason": outcome.reason}
    return record.append("stray", round=number, **facts)


def turn_requests(
    prepared: PreparedRun, number: int, state: State, clients: Sequence[str], folder: Path
) -> Iterator[TurnRequest]:
    """The requests to these clients, made one at a time, when they are needed.

    Where a method sends clients of equal ranks the same, a download is made once for all of
    them and lies on the disk.
    """
    method, context = prepared.method, prepared.context(number)
    clients = tuple(clients)

    def most(id: str) -> int:
        return wire.most_upload_bytes(expected_upload(prepared, number, state, id))

    def encoded(id: str) -> bytes:
        download = method.handout(state, prepared.clients[id], context)
        download = replace(download, base_rounds=state.merge_log.merged(id))
        sparse = Feature.SPARSE_MESSAGES in method.features
        return wire.encode_download(download, prepared.wire_dtype, sparse)

    if Feature.SAME_FOR_EQUAL_RANKS not in method.features:
        yield from (TurnRequest(id, number, encoded(id), most(id)) for id in clients)
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700)
    for id in clients:
        file = download_file(folder, prepared.clients[id])
        if not file.exists():
            write_new(file, encoded(id))
        yield TurnRequest(id, number, file, most(id))


def expected_upload(
    prepared: PreparedRun, number: int, state: State, client: str
) -> wire.ExpectedUpload:
    """The upload that a client has to send in this round."""
    method, who = prepared.method, prepared.clients[client]
    return wire.ExpectedUpload(
        client,
        number,
        who.examples,
        method.upload_spec(state, who, prepared.context(number)),
        prepared.wire_dtype,
        Feature.SPARSE_MESSAGES in method.features,
        _fact_limits(prepared, who.examples),
    )


def _fact_limits(prepared: PreparedRun, examples: int) -> dict[str, wire.FactLimit]:
    """What the facts of a client with so many examples can be; their names are ``METRICS``."""
    experiment = prepared.experiment
    epochs = experiment.training.epochs + (Feature.PROBES in prepared.method.features)
    tokens = examples * epochs * experiment.data.max_tokens
    limits = {
        "tokens": wire.FactLimit(tokens),
        "computed": wire.FactLimit(tokens),
        "steps": wire.FactLimit(examples * epochs),
        "loss_total": wire.FactLimit(MOST_NATS, whole=False, per="loss_tokens"),
        "loss_tokens": wire.FactLimit(tokens),
        "seconds": wire.FactLimit(MOST_SECONDS, whole=False),
        "bytes_down": wire.FactLimit(MOST_BYTES),
    }
    return {name: limits[name] for name in METRICS}


def client_facts(upload: Upload, prepared: PreparedRun) -> dict[str, Any]:
    """What the journal says of a client's upload."""
    metrics = {name: upload.metrics[name] for name in (*METRICS, "bytes_up")}
    return {
        "round": upload.round,
        "client": upload.client,
        "rank_type": prepared.clients[upload.client].rank_type,
        "examples": upload.examples,
        **metrics,
    }
