"""Questions that the gate holds for a while, when the SuperLink has nothing yet to answer them.

Flower's node asks for messages, and three seconds later again; for an object of a message that is
still on its way to the SuperLink, after one second, two, four. The gate asks the SuperLink for it,
several times a second, so that a node hears of its turn at once.
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
"""By the call, the answer that says so, in protobuf: no message; an object known, but not there."""

MOST_QUESTION_BYTES: Final = 4096
"""A question that is held is in memory; Flower's have some hundred bytes."""

_MOST_A_SECOND: Final = 20.0
"""Questions to the SuperLink, of all that are held; one takes it some 10 ms."""

_LONGEST_PAUSE_SECONDS: Final = 3.0
"""However many are held, none is asked less often than its node would."""


@dataclass
class Held:
    """How long questions are held, and how many are now.

    ``seconds`` is well below the 30 after which Flower's node takes a server for dead, and the
    305 for which a signature holds. ``ending`` says that the gate is about to close.
    """

    seconds: float = 20.0
    pause_seconds: float = 0.2
    ending: Callable[[], bool] = lambda: False
    count: int = 0

    async def answer(
        self, ask: Callable[[], Awaitable[httpx.Response]], nothing: bytes, receive: Receive
    ) -> httpx.Response | None:
        """What ``ask`` brings, once it is not ``nothing`` or time is up; None if the node left."""
        until = time.monotonic() + self.seconds
        self.count += 1
        try:
            while await _says(reply := await ask(), nothing) and not self._is_over(until):
                if await self._has_left(receive):
                    return None
            return reply
        finally:
            self.count -= 1

    def _is_over(self, until: float) -> bool:
        return self.ending() or time.monotonic() > until

    async def _has_left(self, receive: Receive) -> bool:
        """Whether the node hangs up in the pause: a message fetched for it then would be lost."""
        pause = min(self.count / _MOST_A_SECOND, _LONGEST_PAUSE_SECONDS)
        try:
            async with asyncio.timeout(max(pause, self.pause_seconds)):
                while (await receive())["type"] != "http.disconnect":
                    pass
        except TimeoutError:
            return False
        return True


async def parts(reply: httpx.Response) -> AsyncIterator[bytes]:
    """A reply's body, as it comes, or at once if it has been read."""
    if reply.is_stream_consumed:
        yield reply.content
        return
    async for part in reply.aiter_raw():
        yield part


async def _says(reply: httpx.Response, text: bytes) -> bool:
    """Whether a reply says just this; what is longer is not read."""
    if reply.status_code != 200 or reply.headers.get("content-length") != str(len(text)):
        return False
    return await reply.aread() == text
