"""The answers that have arrived at the SuperLink, taken out one by one within limits.

Flower fetches all objects of a message before it looks at one, and waits for those that have not
arrived, whoever else has answered. A message is a tree of objects: the head names the records, a
record names its array, and the array its chunks with the size of the whole. So the small objects
are fetched first, and no chunk before the sizes that they declare are compared with the limit.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import httpx
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, PullObjectRequest
from flwr.proto.runtime_pb2 import PullAppMessagesRequest
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import (
    get_object_body,
    get_object_head_values_from_object_content,
    iterate_object_tree,
)
from flwr.superlink.grid import HttpGrid

from flexlora.deployment.flower import records
from flexlora.deployment.flower.answers import (
    Answer,
    NoAnswer,
    malformed,
    read,
    read_content,
    too_large,
    unreadable,
)
from flexlora.errors import ProtocolError
from flexlora.storage.untrusted import short

CHUNK_BYTES: Final = 5 * 2**20
"""Flower's size of the chunks of an array."""

_MOST_OBJECT_BYTES: Final = 2**18
"""Of an object that is no chunk: a head, a record, an array without its values."""

_MOST_RECORDS: Final = 8
"""Objects of a message beside its chunks; ours have a head, two records, an array and their
table."""

_FIRST_PAUSE_SECONDS: Final = 1.0
_LONGEST_PAUSE_SECONDS: Final = 30.0


class Inbox(Protocol):
    """Where answers to the server's messages arrive."""

    def take(self, id: str, most_bytes: int) -> Answer | NoAnswer | None:
        """The answer to the message ``id``, once; None if it has not arrived.

        Its payload has at most ``most_bytes``; a larger one is refused, and not fetched.
        """
        ...


def of(grid: Grid) -> Inbox:
    """The inbox of a grid: of Flower's own, or of one that returns whole messages."""
    return FlowerInbox(grid) if isinstance(grid, HttpGrid) else MessageInbox(grid)


def taken(inbox: Inbox, limits: Mapping[str, int]) -> Iterator[tuple[str, Answer | NoAnswer]]:
    """The answers that have arrived to the messages with these limits in bytes, by id.

    One is in memory at a time, if the caller keeps none.
    """
    for id, most_bytes in limits.items():
        answer = inbox.take(id, most_bytes)
        if answer is not None:
            yield id, answer
            answer = None  # before the next is fetched


@dataclass(frozen=True)
class MessageInbox:
    """The answers of a grid that has them in memory."""

    grid: Grid

    def take(self, id: str, most_bytes: int) -> Answer | NoAnswer | None:
        """See ``Inbox.take``."""
        try:
            messages: Iterable[Message] = self.grid.pull_messages([id])
            return next((read(message, most_bytes) for message in messages), None)
        except httpx.HTTPError:
            raise  # the SuperLink is away
        except Exception as error:
            return unreadable(error)


class _NotYetError(Exception):
    """An object is on its way to the SuperLink."""


class _GoneError(Exception):
    """The SuperLink has no such object any more."""


@dataclass
class _Arriving:
    """An answer that the SuperLink has announced: its id, and the ids of all its objects."""

    id: str
    objects: frozenset[str]
    root: str
    again_at: float = 0.0
    pause_seconds: float = _FIRST_PAUSE_SECONDS


@dataclass
class FlowerInbox:
    """The answers at the SuperLink of Flower's own grid.

    An answer that is not whole is left there, and no other one waits for it. One that is refused
    is deleted there.
    """

    grid: HttpGrid
    _arriving: dict[str, _Arriving] = field(default_factory=dict)

    def take(self, id: str, most_bytes: int) -> Answer | NoAnswer | None:
        """See ``Inbox.take``."""
        arriving = self._arriving.get(id)
        try:
            arriving = arriving or self._announced(id)
            if arriving is None or arriving.again_at > time.monotonic():
                return None
            self._arriving[id] = arriving
            answer = self._fetched(arriving, most_bytes)
        except _NotYetError:
            return None
        except httpx.HTTPError:
            raise  # the SuperLink is away
        except _GoneError:
            answer = NoAnswer("Its answer was not sent to the end.", is_away=True)
        except ProtocolError as error:
            answer = malformed(str(error))
        except Exception as error:
            answer = unreadable(error)
        if (arriving := self._arriving.pop(id, None)) is not None:
            self._delete(arriving)
        return answer

    def _announced(self, id: str) -> _Arriving | None:
        """The answer to a message, if the SuperLink has one; it says so once."""
        pulled = self.grid._runtime_client.PullMessages(PullAppMessagesRequest(message_ids=[id]))
        for message, tree in zip(pulled.messages_list, pulled.message_object_trees, strict=True):
            if message.metadata.reply_to_message_id == id:
                ids = frozenset(node.object_id for node in iterate_object_tree(tree))
                return _Arriving(message.metadata.message_id, ids, tree.object_id)
        return None

    def _delete(self, arriving: _Arriving) -> None:
        """Have the SuperLink delete the answer's objects, those that are still to come too."""
        for id in {arriving.id, arriving.root}:
            confirm = ConfirmMessageReceivedRequest(
                node=self.grid.node, run_id=self.grid.run.run_id, message_object_id=id
            )
            self.grid._runtime_client.ConfirmMessageReceived(confirm)

    def _fetched(self, arriving: _Arriving, most_bytes: int) -> Answer | NoAnswer:
        """The answer, whose small objects are fetched first."""
        most_chunks = _most_chunks(most_bytes)
        if len(arriving.objects) > _MOST_RECORDS + most_chunks:
            raise ProtocolError(
                f"Its answer has {len(arriving.objects)} objects, and one of at most {most_bytes} "
                f"bytes has at most {_MOST_RECORDS + most_chunks}."
            )
        names, body = self._small(arriving, arriving.root, "Message")
        if not names:
            return read(Message.inflate(body), 0)
        (table,) = names
        content = RecordDict()
        names, body = self._small(arriving, table, "RecordDict")
        for name, record in _references(body, RecordDict, names).items():
            match name:
                case records.HEADER:
                    _, config = self._small(arriving, record, "ConfigRecord")
                    content[name] = ConfigRecord.inflate(config)
                case records.PAYLOAD:
                    names, body = self._small(arriving, record, "ArrayRecord")
                    ((key, array),) = _references(body, ArrayRecord, names).items()
                    payload = self._payload(arriving, array, most_bytes)
                    if isinstance(payload, NoAnswer):
                        return payload
                    content[name] = ArrayRecord({key: payload})
                case _:
                    raise ProtocolError(f"Its answer has the unknown record {short(name)}.")
        return read_content(content, most_bytes)

    def _payload(self, arriving: _Arriving, array: str, most_bytes: int) -> Array | NoAnswer:
        """The array, of which no chunk is fetched before its size is compared with the limit."""
        names, content = self._small(arriving, array, "Array")
        told = json.loads(get_object_body(content, Array))
        match told:
            case {"dtype": str(dtype), "shape": [size], "stype": str(stype)} if (
                type(size) is int and size >= 0
            ):
                places = told.get("arraychunk_ids")
            case _:
                raise ProtocolError("Its answer declares no size.")
        if size > most_bytes:
            return too_large(size, most_bytes)
        if not isinstance(places, list) or len(places) > _most_chunks(size):
            raise ProtocolError(f"Its answer has too many chunks for {size} bytes.")
        if not all(type(place) is int and 0 <= place < len(names) for place in places):
            raise ProtocolError("Its answer names chunks that it does not have.")
        chunks: dict[int, bytes] = {}
        received = 0
        for place in places:
            if place not in chunks:
                chunks[place] = self._chunk(arriving, names[place])
            received += len(chunks[place])
            if received > size:
                raise ProtocolError(f"Its answer has more than the {size} bytes it declares.")
        return Array(dtype, (size,), stype, b"".join(chunks[place] for place in places))

    def _chunk(self, arriving: _Arriving, id: str) -> bytes:
        try:
            content = self._object(arriving, id)
        except _NotYetError:
            # Chunks fetched so far are dropped, so that they are not held for one that may never
            # come. Of a client that sends them as Flower does, all are here before the head is.
            arriving.again_at = time.monotonic() + arriving.pause_seconds
            arriving.pause_seconds = min(2 * arriving.pause_seconds, _LONGEST_PAUSE_SECONDS)
            raise
        kind, children, _ = get_object_head_values_from_object_content(content)
        if kind != "ArrayChunk" or children:
            raise ProtocolError("Its answer has another object in the place of a chunk.")
        return content[content.index(b"\0") + 1 :]

    def _small(self, arriving: _Arriving, id: str, kind: str) -> tuple[list[str], bytes]:
        """The names of an object's children, and the object."""
        content = self._object(arriving, id)
        if len(content) > _MOST_OBJECT_BYTES:
            raise ProtocolError(f"Its answer has an object of {len(content)} bytes.")
        is_kind, children, _ = get_object_head_values_from_object_content(content)
        if is_kind != kind:
            raise ProtocolError(f"Its answer has a {short(is_kind)} in the place of a {kind}.")
        return children, content

    def _object(self, arriving: _Arriving, id: str) -> bytes:
        if id not in arriving.objects:
            raise ProtocolError("Its answer names an object that it does not have.")
        request = PullObjectRequest(node=self.grid.node, run_id=self.grid.run.run_id, object_id=id)
        pulled = self.grid._runtime_client.PullObject(request)
        if not pulled.object_found:
            raise _GoneError
        if not pulled.object_available:
            raise _NotYetError
        content: bytes = pulled.object_content
        return content


def _most_chunks(size_bytes: int) -> int:
    """Twice as many as Flower makes of a payload: a version may make smaller ones."""
    return 2 * math.ceil(size_bytes / CHUNK_BYTES)


def _references(content: bytes, kind: type[Any], children: list[str]) -> dict[str, str]:
    """What a table names: an object's id by its name."""
    table = json.loads(get_object_body(content, kind))
    if not isinstance(table, dict) or not table or len(table) > _MOST_RECORDS:
        raise ProtocolError("Its answer has no table of records.")
    if not all(value in children for value in table.values()):
        raise ProtocolError("Its answer names a record that it does not have.")
    return table
