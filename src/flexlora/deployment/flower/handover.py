"""Sends the finished adapter to every client, over Flower's grid, until all have confirmed it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from flwr.app import Message, MessageType
from flwr.serverapp import Grid

from flexlora.deployment.flower import inbox, records
from flexlora.deployment.flower.answers import Answer, NoAnswer
from flexlora.deployment.flower.inbox import Inbox
from flexlora.deployment.server.delivery import Finished, Ledger
from flexlora.deployment.server.registry import ClientRegistry
from flexlora.errors import ProtocolError
from flexlora.storage.untrusted import one_line

_AGAIN_SECONDS: Final = 30.0
"""After this time a node that has not confirmed the adapter is sent it again."""

_LAST_SECONDS: Final = 20.0
"""How long the server waits at the end until the last clients know that the run is over."""

_LIFETIME_SECONDS: Final = 3600.0


@dataclass
class Handover:
    """The clients of the run to which the finished adapter is sent.

    A client that was away is sent it when its node is online again. One that has come after the
    last round is told that the run is over. ``spec`` is the run's specification, by which a client
    that was restarted checks the adapter.
    """

    grid: Grid
    registry: ClientRegistry
    spec: str
    finished: Finished
    ledger: Ledger
    inbox: Inbox
    poll_seconds: float = 0.25
    _sent_at: dict[int, float] = field(default_factory=dict)
    _waiting: dict[str, int] = field(default_factory=dict)
    _dismissed: set[int] = field(default_factory=set)
    _faults: dict[int, str] = field(default_factory=dict)

    def run(self) -> None:
        """Send it until every client of the run that may take part has confirmed it."""
        payload = records.payload(self.finished.payload)
        while self.outstanding():
            online = self._online()
            self._sent_at = {node: at for node, at in self._sent_at.items() if node in online}
            for node in sorted(online - self._dismissed):
                if self._took_part(node):
                    self._send(node, payload)
                else:
                    self._dismiss(node)
            if not self._receive():
                time.sleep(self.poll_seconds)
        until = time.monotonic() + _LAST_SECONDS
        while self._dismissed and time.monotonic() < until:
            time.sleep(self.poll_seconds)
            self._online()

    def _online(self) -> set[int]:
        """The nodes that are online; one that knows that the run is over stops."""
        online = set(self.grid.get_node_ids())
        self._dismissed &= online
        return online

    def outstanding(self) -> list[str]:
        """The clients of the run that have not confirmed it and may take part."""
        return self.ledger.without(id for id in self.registry if self.registry.is_authorised(id))

    def _took_part(self, node: int) -> bool:
        # Without keys a client that was restarted has a new node, with a name of its own choice.
        return not self.registry.bound or self.registry.name_of(node) in self.registry

    def _dismiss(self, node: int) -> None:
        """Tell a node that the run is over."""
        if self._pushed(node, records.record({"kind": "over", "rounds": self.finished.rounds})):
            self._dismissed.add(node)

    def _send(self, node: int, payload: Any) -> None:
        recently = time.monotonic() - _AGAIN_SECONDS
        if self._sent_at.get(node, recently) > recently:
            return
        header = {"kind": "store", "terms": self.spec, **self.finished.facts}
        if id := self._pushed(node, records.record(header, payload)):
            self._waiting[id] = node
            self._sent_at[node] = time.monotonic()

    def _pushed(self, node: int, content: Any) -> str | None:
        message = Message(content, node, MessageType.QUERY, ttl=_LIFETIME_SECONDS)
        return next(iter(self.grid.push_messages([message])), None)

    def _receive(self) -> bool:
        """Read the answers that have arrived; whether there was one."""
        was_idle = True
        for id, answer in inbox.taken(self.inbox, dict.fromkeys(self._waiting, 0)):
            was_idle = False
            self._answered(self._waiting.pop(id), answer)
        return not was_idle

    def _answered(self, node: int, answer: Answer | NoAnswer) -> None:
        """Record a client that has the adapter, and tell it that the run is over."""
        try:
            facts = answer.facts()
            client = self._client(node, facts)
            if facts.get("digest") != self.finished.digest:
                raise ProtocolError(f"It has {one_line(facts.get('digest'), 70)!r}.")
        except ProtocolError as error:
            self._fail(node, str(error))
            return
        if self.ledger.add(client):
            self.registry.note(f"client {client} has the adapter")
        self._dismiss(node)

    def _client(self, node: int, facts: Mapping[str, Any]) -> str:
        name = self.registry.name_of(node) if self.registry.bound else facts.get("client")
        # Others would fill the ledger, which is kept in memory and on the disk.
        if not isinstance(name, str) or name not in self.registry:
            raise ProtocolError("It gives no name of a client of the run.")
        return name

    def _fail(self, node: int, reason: str) -> None:
        """Report why a client has no adapter, once for each reason."""
        before, self._faults[node] = self._faults.get(node), reason
        if reason != before:
            name = self.registry.name_of(node)
            client = "a client" if name is None else f"client {name}"
            self.registry.note(f"{client} does not have the adapter: {reason}")
