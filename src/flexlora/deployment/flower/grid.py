"""The clients of other people's machines: jobs and replies as messages over Flower's grid."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import httpx
from flwr.app import ArrayRecord, Message, MessageType
from flwr.serverapp import Grid

from flexlora.deployment.flower import records
from flexlora.deployment.server.registry import ClientInfo, ClientRegistry
from flexlora.errors import FlexloraError, ProtocolError
from flexlora.federation import (
    LateReply,
    Lost,
    Received,
    Reply,
    TransportEvent,
    TurnRequest,
    WaitPolicy,
)
from flexlora.journal import LossKind

_ENROL_SECONDS: Final = 3600.0
"""How long a node may take to load its model and say who it is."""

_AGAIN_SECONDS: Final = 30.0
"""After which a node that was not let in, or has not answered, is asked again who it is: its
owner may have mended it, or its answer may be lost with a SuperLink that was killed."""

_AWAY: Final = (3, 4, 5)
"""Flower's codes for a message or a reply that is gone, and a node that is."""

_LONGEST_SECONDS: Final = 12 * 3600.0
"""How long a message lives, where a round has no deadline."""


Asked = tuple[str, int]
"""A client, and the round of its job."""


@dataclass
class Flower:
    """A federation over Flower.

    ``terms`` is what every node is told. Nodes are asked who they are when they appear;
    ``roll`` knows them by their own names, and Flower's numbers for them appear nowhere else.
    A round begins when ``quorum`` of its clients are there.
    """

    grid: Grid
    roll: ClientRegistry
    terms: str
    quorum: int = 1
    poll_seconds: float = 0.25
    clients_at_once: int = 1
    _client: dict[int, str] = field(default_factory=dict)
    _refused: dict[int, str] = field(default_factory=dict)
    _invited: dict[str, int] = field(default_factory=dict)
    _asked_at: dict[int, float] = field(default_factory=dict)
    _doubted: set[int] = field(default_factory=set)
    _late: dict[str, Asked] = field(default_factory=dict)
    _news: list[TransportEvent] = field(default_factory=list)

    def gather(self, clients: int) -> None:
        """Wait until so many clients have come."""
        self._wait_for(clients)

    def present(self, clients: Collection[str]) -> list[str]:
        """The clients whose nodes are online; waits until they are as many as the quorum.

        Those who have come since are among them, whether or not they are in ``clients``.
        """
        return self._wait_for(self.quorum)

    def exchange(self, jobs: Iterable[TurnRequest], patience: WaitPolicy) -> Iterator[Received]:
        """Hand out the jobs, then yield what comes back, as it comes.

        Late answers to earlier rounds are told as strays.
        """
        yield from self._told()
        started, seconds = time.monotonic(), patience.seconds
        asked: dict[str, Asked] = {}
        held = _Payloads()
        for job in jobs:
            if (message := self._message(job, held, seconds)) is None:
                yield Lost(job.client, "Its node is not online.", LossKind.UNREACHABLE)
            elif not (id := next(iter(self.grid.push_messages([message])), None)):
                reason = "Flower did not take the message to it."
                yield Lost(job.client, reason, LossKind.UNREACHABLE)
            else:
                asked[id] = job.client, job.round
                yield TransportEvent("asked", {"client": job.client})
        while asked and not patience.enough():
            if seconds is not None and time.monotonic() - started > seconds:
                late = f"It did not answer within {seconds:g} s."
                kind = LossKind.NO_ANSWER
                yield from (Lost(client, late, kind) for client, _ in asked.values())
                break
            yield from self._heard(asked)
        self._late |= asked

    def _heard(self, asked: dict[str, Asked]) -> Iterator[Received]:
        """What one look at the grid brings; ``asked`` loses those who have answered."""
        found = False
        for id, message in self._pulled([*asked, *self._late, *self._invited]):
            found = True
            if id in self._invited:
                self._welcome(message, self._invited.pop(id))
            elif id in self._late:
                yield self._late_answer(message, self._late.pop(id), asked)
            elif id in asked:
                if _complains(message):
                    self._ask_anew(asked[id][0])
                yield _reply(message, asked.pop(id))
        yield from self._told()
        if not found:
            time.sleep(self.poll_seconds)

    def _pulled(self, ids: list[str]) -> Iterator[tuple[str, Message | ValueError]]:
        """What has come in answer to these messages, by their ids, one in memory at a time.

        Flower makes objects of a node's bytes while it pulls, and what it has pulled together
        with something that it cannot read is lost: so each is asked for alone.
        """
        for id in ids:
            try:
                for message in self.grid.pull_messages([id]):
                    yield id, message
            except httpx.HTTPError:
                raise  # the SuperLink is away
            except Exception as error:
                reason = f"Flower cannot read its answer ({type(error).__name__}: {error})."
                yield id, ValueError(reason[:500])

    def _late_answer(
        self, message: Message | ValueError, whose: Asked, asked: dict[str, Asked]
    ) -> Received:
        """An answer to an earlier request: of use if the same is still asked of its client."""
        client, round = whose
        again = next((i for i, other in asked.items() if other == whose), None)
        if again is None or isinstance(message, ValueError) or message.has_error():
            return LateReply(client, f"It answers an earlier request, for round {round}.")
        self._late[again] = whose
        return _reply(message, asked.pop(again))

    def _message(self, job: TurnRequest, held: _Payloads, seconds: float | None) -> Message | None:
        """The job as a message to its client's node, if that is known."""
        node = next((n for n, client in self._client.items() if client == job.client), None)
        if node is None:
            return None
        header = {"kind": "turn", "terms": self.terms, "client": job.client, "round": job.round}
        content = records.record(header, held.of(job))
        ttl = _LONGEST_SECONDS if seconds is None else seconds + _ENROL_SECONDS
        return Message(content, node, MessageType.TRAIN, ttl=ttl, group_id=str(job.round))

    def _wait_for(self, count: int) -> list[str]:
        while True:
            online = set(self.grid.get_node_ids())
            self._client = {n: c for n, c in self._client.items() if n in online}
            self._asked_at = {n: at for n, at in self._asked_at.items() if n in online}
            self._invite(online - self._client.keys())
            if self._invited:
                for id, message in self._pulled(list(self._invited)):
                    self._welcome(message, self._invited.pop(id))
            here = set(self._client.values())
            if len(here) >= count:
                return [client for client in self.roll if client in here]
            time.sleep(self.poll_seconds)

    def _invite(self, nodes: Collection[int]) -> None:
        """Ask nodes that nobody knows yet who they are, each at most every half minute."""
        lately = time.monotonic() - _AGAIN_SECONDS
        for node in sorted(nodes):
            if self._asked_at.get(node, lately) > lately:
                continue
            content = records.record({"kind": "enrol", "terms": self.terms})
            message = Message(content, node, MessageType.QUERY, ttl=_ENROL_SECONDS)
            if id := next(iter(self.grid.push_messages([message])), None):
                self._invited[id] = node
                self._asked_at[node] = time.monotonic()

    def _ask_anew(self, client: str) -> None:
        """Ask a client at once who it is: it may have been started again, with other means."""
        for node in [n for n, name in self._client.items() if name == client]:
            del self._client[node]
            self._asked_at.pop(node, None)
            self._doubted.add(node)
            self._invite([node])

    def _welcome(self, message: Message | ValueError, node: int) -> None:
        """Write down who answered, or why it is not let in."""
        if node in self._client:
            return  # it was asked more than once while it loaded its model
        try:
            if isinstance(message, ValueError):
                raise message
            if message.has_error():
                if message.error.code in _AWAY:
                    self._asked_at.pop(node, None)  # it is asked when it is back
                    return
                raise ProtocolError(_fault(message))
            said, _ = records.opened(message.content)
            if "error" in said:
                raise ProtocolError(str(said["error"])[:2000])
            entries = dict(self.roll.entries)
            client, entry = self.roll.admit(said, node)
        except FlexloraError as error:
            before, self._refused[node] = self._refused.get(node), str(error)
            if str(error) != before:
                self.roll.note(f"a node was not let in: {error}")
                self._news.append(TransportEvent("refused", {"reason": str(error)}))
            return
        # A client that was restarted without a key has a new node.
        self._client = {n: c for n, c in self._client.items() if c != client} | {node: client}
        doubted = node in self._doubted
        self._doubted.discard(node)
        if doubted and entries.get(client) == entry:
            return
        self._announce(client, entry)

    def _announce(self, client: str, entry: ClientInfo) -> None:
        """Say who has come, and with what."""
        self.roll.note(f"{client} has come: {entry.rank_type}, {entry.examples} rows")
        facts: dict[str, Any] = {
            "client": client,
            "rank_type": entry.rank_type,
            "ranks": sorted({entry.attention, entry.feed_forward}),
            "examples": entry.examples,
            "device": entry.device,
            "tokens_per_second": entry.tokens_per_second,
        }
        if note := self.roll.capped(client):
            self.roll.note(note)
            facts["note"] = note
        self._news.append(TransportEvent("joined", facts))

    def _told(self) -> Iterator[TransportEvent]:
        news, self._news = self._news, []
        yield from news


@dataclass
class _Payloads:
    """The downloads of an exchange as Flower holds them: one of each file, for all its clients."""

    files: dict[Path, ArrayRecord] = field(default_factory=dict)

    def of(self, job: TurnRequest) -> ArrayRecord:
        """What a job hands out."""
        if not isinstance(job.download, Path):
            return records.payload(job.download)
        if job.download not in self.files:
            self.files[job.download] = records.payload(job.download.read_bytes())
        return self.files[job.download]


def _fault(message: Message) -> str:
    """An error of Flower's in words."""
    return f"Flower's error {message.error.code}: {message.error.reason or 'no reason'}"[:500]


def _complains(message: Message | ValueError) -> bool:
    """Whether a client says itself why it has not trained; not that it forgot what it had."""
    if isinstance(message, ValueError) or message.has_error():
        return False
    try:
        header, _ = records.opened(message.content)
    except FlexloraError:
        return False
    return "error" in header and header.get("forgot") is not True


def _reply(message: Message | ValueError, asked: Asked) -> Reply | Lost:
    """What a client answered: its upload, its own fault, or Flower's."""
    client, _ = asked
    if isinstance(message, ValueError):
        return Lost(client, str(message), LossKind.UNREACHABLE)
    if message.has_error():
        return Lost(client, _fault(message), LossKind.UNREACHABLE)
    try:
        header, data = records.opened(message.content)
    except FlexloraError as fault:
        return Lost(client, str(fault), LossKind.INVALID_UPLOAD)
    if "error" in header:
        lost_base = header.get("forgot") is True
        kind = LossKind.LOST_STATE if lost_base else LossKind.CLIENT_ERROR
        return Lost(client, str(header["error"])[:500], kind, lost_base)
    return Reply(client, data)
