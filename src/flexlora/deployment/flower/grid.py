"""The transport of the round loop over Flower: requests and replies as messages of its grid."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

from flwr.app import ArrayRecord, Message, MessageType
from flwr.serverapp import Grid

from flexlora.deployment.flower import inbox, records
from flexlora.deployment.flower.answers import LONGEST_REASON, Answer, NoAnswer
from flexlora.deployment.flower.handover import Handover
from flexlora.deployment.flower.inbox import Inbox
from flexlora.deployment.server import run_files
from flexlora.deployment.server.delivery import Finished, Ledger
from flexlora.deployment.server.registry import ClientInfo, ClientRegistry
from flexlora.errors import FlexloraError
from flexlora.federation import (
    LateReply,
    Lost,
    Query,
    QueryAnswer,
    Received,
    Reply,
    TransportEvent,
    TurnRequest,
    WaitPolicy,
)
from flexlora.journal import LossKind

_ENROL_SECONDS: Final = 3600.0
"""Time for a node to load its model and report itself."""

_AGAIN_SECONDS: Final = 30.0
"""After this time a node that was rejected or has not replied is sent another enrolment request:
its owner may have repaired it, or its reply may be lost with a SuperLink that was killed."""

_LONGEST_SECONDS: Final = 12 * 3600.0
"""Lifetime of a message in a round without a deadline."""

_MOST_BYTES: Final = 2**28
"""Of an upload, if a request does not say how large it can be."""

NOT_NEEDED: Final = "enough uploads had arrived before it"
TOO_LATE: Final = "it came after the deadline"


class Request(NamedTuple):
    """A request to a client: of a "turn" of training or to "evaluate", in a round.

    Its answer has a payload of at most ``most_bytes``.
    """

    client: str
    round: int
    kind: str = "turn"
    most_bytes: int = 0


@dataclass
class FlowerTransport:
    """The clients of a federation over Flower.

    Every node gets ``spec``, the run's specification as JSON. Nodes are sent an enrolment request
    when they appear. The ``registry`` has clients by their own names; only this class uses
    Flower's numbers of their nodes. A round begins when ``quorum`` clients are online.
    """

    grid: Grid
    registry: ClientRegistry
    spec: str
    quorum: int = 1
    poll_seconds: float = 0.25
    clients_at_once: int = 1
    _inbox: Inbox = field(init=False)
    _allowed_bytes: int = 0
    _clients: dict[int, str] = field(default_factory=dict)
    _rejected: dict[int, str] = field(default_factory=dict)
    _enrolling: dict[str, int] = field(default_factory=dict)
    _enrol_sent_at: dict[int, float] = field(default_factory=dict)
    _re_enrolling: set[int] = field(default_factory=set)
    _late: dict[str, Request] = field(default_factory=dict)
    _unused: dict[tuple[str, int], str] = field(default_factory=dict)
    _events: list[TransportEvent] = field(default_factory=list)
    _certificate_notes: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._inbox = inbox.of(self.grid)

    def wait_for_clients(self, count: int) -> None:
        """Wait until this many clients have connected."""
        self._wait_for(count)

    def present(self, clients: Collection[str]) -> list[str]:
        """The clients whose nodes are online; waits until there are as many as the quorum.

        Clients that have connected since are included, whether or not they are in ``clients``.
        """
        return self._wait_for(self.quorum)

    def deliver(self, finished: Finished, ledger: Ledger) -> None:
        """Send the finished adapter to every client; returns once all have confirmed it."""
        Handover(
            *(self.grid, self.registry, self.spec, finished, ledger),
            self._inbox,
            self.poll_seconds,
        ).run()

    def evaluators(self) -> list[str]:
        """The clients that are connected and have held out rows."""
        connected = set(self._clients.values())
        entries = self.registry.entries.items()
        return [client for client, entry in entries if entry.holdout and client in connected]

    def exchange(self, jobs: Iterable[TurnRequest], patience: WaitPolicy) -> Iterator[Received]:
        """Send the requests, then yield replies as they arrive.

        Replies to requests of earlier rounds are yielded as ``LateReply``.
        """
        payloads = _Payloads()
        for answer in self._exchanged(
            ((_turn(job), payloads.of(job), {}) for job in jobs), patience
        ):
            if not isinstance(answer, QueryAnswer):
                yield answer

    def evaluate(
        self, queries: Iterable[Query], patience: WaitPolicy
    ) -> Iterator[QueryAnswer | Lost | LateReply | TransportEvent]:
        """Ask clients to evaluate an adapter, then yield answers as they arrive."""
        payloads = _Payloads()
        requests = (
            (Request(q.client, q.round, "evaluate"), payloads.of_bytes(q.payload), q.facts)
            for q in queries
        )
        for answer in self._exchanged(requests, patience):
            if not isinstance(answer, Reply):
                yield answer

    def _exchanged(
        self,
        requests: Iterable[tuple[Request, ArrayRecord, Mapping[str, Any]]],
        patience: WaitPolicy,
    ) -> Iterator[Received | QueryAnswer]:
        """See ``exchange``; each request with its payload and the facts of its header."""
        yield from self._take_events()
        started, seconds = time.monotonic(), patience.seconds
        pending: dict[str, Request] = {}
        for request, payload, facts in requests:
            sent = self._sent(request, self._message(request, payload, facts, seconds), pending)
            if sent is not None:
                yield sent
        while pending and not patience.enough():
            if seconds is not None and time.monotonic() - started > seconds:
                reason = f"It did not answer within {seconds:g} s."
                kind = LossKind.NO_ANSWER
                yield from (Lost(request.client, reason, kind) for request in pending.values())
                break
            yield from self._poll(pending)
        self._late |= pending
        reason = NOT_NEEDED if patience.enough() else TOO_LATE
        self._unused |= {r[:2]: reason for r in pending.values() if r.kind == "turn"}

    def _sent(
        self, request: Request, message: Message | None, pending: dict[str, Request]
    ) -> Lost | TransportEvent | None:
        """Send a request, if its node is online, and add it to ``pending``."""
        if message is None:
            return Lost(request.client, "Its node is not online.", LossKind.UNREACHABLE)
        self._allow(request.most_bytes)
        id = next(iter(self.grid.push_messages([message])), None)
        if not id:
            reason = "Flower did not accept the message to it."
            return Lost(request.client, reason, LossKind.UNREACHABLE)
        pending[id] = request
        if request.kind == "turn":
            return TransportEvent("asked", {"client": request.client})
        return None

    def _allow(self, most_bytes: int) -> None:
        """Have the SuperLink store answers of this size."""
        if most_bytes > self._allowed_bytes:
            run_files.allow_replies(self.registry.folder, most_bytes)
            self._allowed_bytes = most_bytes

    def _poll(self, pending: dict[str, Request]) -> Iterator[Received | QueryAnswer]:
        """Poll the grid once; requests with a reply are removed from ``pending``."""
        idle = True
        limits = {id: request.most_bytes for id, request in (pending | self._late).items()}
        for id, answer in inbox.taken(self._inbox, limits | dict.fromkeys(self._enrolling, 0)):
            idle = False
            if id in self._enrolling:
                self._on_enrolled(answer, self._enrolling.pop(id))
            elif id in self._late:
                yield self._late_reply(answer, self._late.pop(id), pending)
            elif id in pending:
                if _has_own_error(answer) and pending[id].kind == "turn":
                    self._enrol_again(pending[id].client)
                yield _reply(answer, pending.pop(id))
            del answer  # before the next one is fetched
        yield from self._take_events()
        if idle:
            time.sleep(self.poll_seconds)

    def _late_reply(
        self, answer: Answer | NoAnswer, request: Request, pending: dict[str, Request]
    ) -> Received | QueryAnswer:
        """An answer to an earlier request, used if the same request is pending again."""
        again = next((id for id, other in pending.items() if other == request), None)
        if again is None or isinstance(answer, NoAnswer):
            return LateReply(
                request.client, f"It answers an earlier request, for round {request.round}."
            )
        self._unused.pop(request[:2], None)
        self._late[again] = request
        return _reply(answer, pending.pop(again))

    def _message(
        self,
        request: Request,
        payload: ArrayRecord,
        facts: Mapping[str, Any],
        seconds: float | None,
    ) -> Message | None:
        """The request as a message to its client's node; None if no node is online."""
        client, round, kind, _ = request
        node = next((n for n, name in self._clients.items() if name == client), None)
        if node is None:
            return None
        header = {"kind": kind, "terms": self.spec, "client": client, "round": round, **facts}
        if unused := {number: why for (id, number), why in self._unused.items() if id == client}:
            header["unused"] = unused
            self._unused = {key: why for key, why in self._unused.items() if key[0] != client}
        ttl = _LONGEST_SECONDS if seconds is None else seconds + _ENROL_SECONDS
        message_type = MessageType.TRAIN if kind == "turn" else MessageType.EVALUATE
        content = records.record(header, payload)
        return Message(content, node, message_type, ttl=ttl, group_id=str(round))

    def _wait_for(self, count: int) -> list[str]:
        while True:
            online = set(self.grid.get_node_ids())
            self._clients = {n: c for n, c in self._clients.items() if n in online}
            self._enrol_sent_at = {n: at for n, at in self._enrol_sent_at.items() if n in online}
            self._enrol(online - self._clients.keys())
            if self._enrolling:
                for id, answer in inbox.taken(self._inbox, dict.fromkeys(self._enrolling, 0)):
                    self._on_enrolled(answer, self._enrolling.pop(id))
            connected = set(self._clients.values())
            if len(connected) >= count:
                return [client for client in self.registry if client in connected]
            time.sleep(self.poll_seconds)

    def _enrol(self, nodes: Collection[int]) -> None:
        """Send enrolment requests to nodes without a client, at most every half minute each."""
        recently = time.monotonic() - _AGAIN_SECONDS
        for node in sorted(nodes):
            if self._enrol_sent_at.get(node, recently) > recently:
                continue
            content = records.record({"kind": "enrol", "terms": self.spec})
            message = Message(content, node, MessageType.QUERY, ttl=_ENROL_SECONDS)
            if id := next(iter(self.grid.push_messages([message])), None):
                self._enrolling[id] = node
                self._enrol_sent_at[node] = time.monotonic()

    def _enrol_again(self, client: str) -> None:
        """Enrol a client again at once: it may have been restarted, with other limits."""
        for node in [n for n, name in self._clients.items() if name == client]:
            del self._clients[node]
            self._enrol_sent_at.pop(node, None)
            self._re_enrolling.add(node)
            self._enrol([node])

    def _on_enrolled(self, answer: Answer | NoAnswer, node: int) -> None:
        """Record the client of a node, or the reason why it is rejected."""
        if node in self._clients:
            return  # it had several requests while it loaded its model
        if isinstance(answer, NoAnswer) and answer.is_away:
            self._enrol_sent_at.pop(node, None)  # it is enrolled when it is back
            return
        entries = dict(self.registry.entries)
        try:
            client, entry = self.registry.admit(answer.facts(), node)
        except FlexloraError as error:
            self._reject(node, str(error))
            return
        # A client that was restarted without a key has a new node.
        self._clients = {n: c for n, c in self._clients.items() if c != client} | {node: client}
        unchanged = node in self._re_enrolling and entries.get(client) == entry
        self._re_enrolling.discard(node)
        if not unchanged:
            self._announce(client, entry)

    def _reject(self, node: int, reason: str) -> None:
        """Report a rejected node, once for each reason."""
        before, self._rejected[node] = self._rejected.get(node), reason
        if reason != before:
            name = self.registry.name_of(node)
            client = "a client" if name is None else f"client {name}"
            self.registry.note(f"{client} was rejected: {reason}")
            facts = {"reason": reason} if name is None else {"client": name, "reason": reason}
            self._events.append(TransportEvent("refused", facts))

    def _announce(self, client: str, entry: ClientInfo) -> None:
        """Report a client that has connected."""
        offer = f"{entry.rank_text}, {entry.examples} examples"
        self.registry.note(f"client {client} connected: {offer}")
        facts: dict[str, Any] = {
            "client": client,
            "rank_type": entry.rank_type,
            "ranks": sorted({entry.attention, entry.feed_forward}),
            "examples": entry.examples,
            "device": entry.device,
            "tokens_per_second": entry.tokens_per_second,
            "holdout": entry.holdout,
        }
        if note := self.registry.capped(client):
            self.registry.note(note)
            facts["note"] = note
        self._events.append(TransportEvent("joined", facts))

    def _take_events(self) -> Iterator[TransportEvent]:
        for what, note in run_files.certificate_notes(self.registry.folder).items():
            if what not in self._certificate_notes:
                self._certificate_notes.add(what)
                facts = {"note": note.sentence, "renewed": note.renewed}
                self._events.append(TransportEvent("certificate", facts))
        events, self._events = self._events, []
        yield from events


@dataclass
class _Payloads:
    """The downloads of an exchange as Flower's arrays: one of each file, for all its clients."""

    files: dict[Path, ArrayRecord] = field(default_factory=dict)
    last: tuple[bytes, ArrayRecord] | None = None

    def of(self, job: TurnRequest) -> ArrayRecord:
        """The download of a request."""
        if not isinstance(job.download, Path):
            return self.of_bytes(job.download)
        if job.download not in self.files:
            self.files[job.download] = records.payload(job.download.read_bytes())
        return self.files[job.download]

    def of_bytes(self, data: bytes) -> ArrayRecord:
        """Bytes as an array, made once of the same bytes in consecutive requests."""
        if self.last is None or self.last[0] is not data:
            self.last = data, records.payload(data)
        return self.last[1]


def _turn(job: TurnRequest) -> Request:
    most_bytes = _MOST_BYTES if job.most_bytes_up is None else job.most_bytes_up
    return Request(job.client, job.round, most_bytes=most_bytes)


def _has_own_error(answer: Answer | NoAnswer) -> bool:
    """Whether a client reports an error of its own, other than lost state."""
    return isinstance(answer, Answer) and answer.error is not None and not answer.has_forgotten


def _reply(answer: Answer | NoAnswer, request: Request) -> Reply | QueryAnswer | Lost:
    """A client's upload or other answer, or its error, or Flower's."""
    client = request.client
    if isinstance(answer, NoAnswer):
        return Lost(client, answer.reason, answer.kind, code=answer.code)
    if (error := answer.error) is not None:
        kind = LossKind.LOST_STATE if answer.has_forgotten else LossKind.CLIENT_ERROR
        return Lost(client, error[:LONGEST_REASON], kind, answer.has_forgotten)
    if request.kind == "turn":
        return Reply(client, answer.payload)
    return QueryAnswer(client, answer.header)
