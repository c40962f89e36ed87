"""What a node may store at the SuperLink: one answer to each request, of a bounded size.

Flower stores all that an authorised node sends, in memory and in a file, until the run fetches it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from fastapi import HTTPException
from flwr.proto.message_pb2 import PushObjectResponse

from flexlora.deployment.flower.inbox import CHUNK_BYTES

_BESIDE_BYTES: Final = 2**20
"""Of an answer beside its payload: its header, and the tables that Flower makes."""

MOST_OBJECT_BYTES: Final = CHUNK_BYTES + 2**16
_MOST_ANNOUNCEMENT_BYTES: Final = 2**19
"""Of the names of an answer's objects, some 70 bytes each."""
_MOST_ATTEMPTS: Final = 3
"""How often an answer may be sent, after connections that broke."""
_MOST_REMEMBERED: Final = 10_000

Key = tuple[int, str]
"""A node, and the request that it answers; "" for answers that an earlier SuperLink has begun."""


@dataclass
class ReplyBudget:
    """Counts the bytes of each node's answers, and refuses what is above the limit.

    ``limit_file`` has the largest payload of an answer in bytes; the run writes it.
    """

    limit_file: Path | None
    _sessions: OrderedDict[str, Key] = field(default_factory=OrderedDict)
    _received: OrderedDict[Key, int] = field(default_factory=OrderedDict)

    def install(self, handlers: ModuleType) -> None:
        """Stand before Flower's handlers of the two requests by which a node sends an answer."""
        handlers.push_messages = self._announcing(handlers.push_messages)  # type: ignore[attr-defined]
        handlers.push_object = self._storing(handlers.push_object)  # type: ignore[attr-defined]

    @property
    def most_bytes(self) -> int:
        """Of one answer."""
        try:
            text = "0" if self.limit_file is None else self.limit_file.read_text(encoding="ascii")
            return int(text) + _BESIDE_BYTES
        except (FileNotFoundError, ValueError):
            return _BESIDE_BYTES

    def _announcing(self, push_messages: Callable[..., Any]) -> Callable[..., Any]:
        def announced(request: Any, state: Any) -> Any:
            self._check_announcement(request)
            reply = push_messages(request=request, state=state)
            if reply.objects_to_push:
                answered = request.messages_list[0].metadata.reply_to_message_id
                self._remember(self._sessions, reply.session_id, (request.node.node_id, answered))
            return reply

        return announced

    def _check_announcement(self, request: Any) -> None:
        if request.ByteSize() > _MOST_ANNOUNCEMENT_BYTES:
            raise HTTPException(413, "The answer has too many objects.")
        if len(request.messages_list) != 1 or len(request.message_object_trees) != 1:
            raise HTTPException(400, "One answer is sent at a time.")
        tree = request.message_object_trees[0]
        # By the answer's name its objects are deleted. Their number is the run's to look at, which
        # then knows that the client has answered, and does not wait for it.
        if request.messages_list[0].metadata.message_id != tree.object_id:
            raise HTTPException(400, "The answer has another name than its objects.")

    def _storing(self, push_object: Callable[..., Any]) -> Callable[..., Any]:
        def stored(request: Any, state: Any) -> Any:
            size = len(request.object_content)
            if size > MOST_OBJECT_BYTES:
                raise HTTPException(413, f"An object has at most {MOST_OBJECT_BYTES} bytes.")
            node = request.node.node_id
            key = self._sessions.get(request.session_id, (node, ""))
            received = self._received.get(key, 0) + size
            if key[0] != node or received > _MOST_ATTEMPTS * self.most_bytes:
                return PushObjectResponse(stored=False)
            self._remember(self._received, key, received)
            return push_object(request=request, state=state)

        return stored

    @staticmethod
    def _remember(table: OrderedDict[Any, Any], key: Any, value: Any) -> None:
        table[key] = value
        table.move_to_end(key)
        if len(table) > _MOST_REMEMBERED:
            table.popitem(last=False)
