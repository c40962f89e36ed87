"""Long polling at the gate: a node's request waits there until the SuperLink has something for it.

Flower's node polls for messages every three seconds, and for an object of a message that is still
on its way to the SuperLink after one second, two, four. The gate polls the SuperLink several times
a second in its place, so that a node gets a request without delay.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Final

import httpx
from starlette.types import Receive

NOTHING_YET: Final = {b"/v1/fleet/pull-messages": b"", b"/v1/fleet/pull-object": b"\x08\x01"}
"""The SuperLink's reply of each call that stands for "nothing yet", in protobuf: no message; an
object that is registered but has not arrived."""

MOST_WAITING_BYTES: Final = 4096
"""The largest request that waits in memory; Flower's have some hundred bytes."""

_MOST_A_SECOND: Final = 20.0
"""Polls of the SuperLink per second, of all waiting requests together; one takes some 10 ms."""

_LONGEST_PAUSE_SECONDS: Final = 3.0
"""However many requests wait, each is polled at least as often as its node would poll."""


@dataclass
class LongPoll:
    """How long requests wait, and how many wait now.

    ``seconds`` is well below the 30 after which Flower's node takes a server for dead, and the
    305 for which a signature is valid. ``ending`` returns whether the gate is about to close.
    """

    seconds: float = 20.0
    pause_seconds: float = 0.2
    ending: Callable[[], bool] = lambda: False
    count: int = 0

    async def reply(
        self, poll: Callable[[], Awaitable[httpx.Response]], nothing: bytes, receive: Receive
    ) -> httpx.Response | None:
        """The first reply that is not ``nothing``, or the last one; None if the node left."""
        until = time.monotonic() + self.seconds
        self.count += 1
        try:
            while await _is(reply := await poll(), nothing) and not self._is_over(until):
                if await self._has_left(receive):
                    return None
            return reply
        finally:
            self.count -= 1

    def _is_over(self, until: float) -> bool:
        return self.ending() or time.monotonic() > until

    async def _has_left(self, receive: Receive) -> bool:
        """Whether the node disconnects in the pause: a message fetched after that would be lost."""
        pause = min(self.count / _MOST_A_SECOND, _LONGEST_PAUSE_SECONDS)
        try:
            async with asyncio.timeout(max(pause, self.pause_seconds)):
                while (await receive())["type"] != "http.disconnect":
                    pass
        except TimeoutError:
            return False
        return True


async def body_chunks(reply: httpx.Response) -> AsyncIterator[bytes]:
    """A reply's body, as it arrives, or at once if it has been read."""
    if reply.is_stream_consumed:
        yield reply.content
        return
    async for chunk in reply.aiter_raw():
        yield chunk


async def _is(reply: httpx.Response, body: bytes) -> bool:
    """Whether a reply has this body; a longer one is not read."""
    if reply.status_code != 200 or reply.headers.get("content-length") != str(len(body)):
        return False
    return await reply.aread() == body
