"""The bodies of requests: passed on as they arrive, at a least rate, within a memory budget."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Final

from starlette.types import Receive

from flexlora.deployment.flower.gate_rules import Refused, RequestLimits

_SMALL_BYTES: Final = 2**14
"""Bodies up to this size are not counted: the number of requests is bounded too."""


async def body(receive: Receive, length: int, limits: RequestLimits) -> AsyncIterator[bytes]:
    """The chunks of a request's body of ``length`` bytes.

    Raises:
        Refused: it is too slow or not complete.
    """
    received_bytes, until, wanted_bytes = 0, _in(limits.window_seconds), limits.window_bytes
    while True:
        try:
            async with asyncio.timeout_at(until):
                event = await receive()
        except TimeoutError as error:
            raise Refused(
                408, f"Too little of the body came in {limits.window_seconds:.0f} seconds."
            ) from error
        if event["type"] == "http.disconnect":
            raise Refused(400, "The node disconnected before its request was complete.")
        chunk: bytes = event.get("body", b"")
        received_bytes += len(chunk)
        if received_bytes > length:
            raise Refused(413, f"The body has more than the {length} bytes that were announced.")
        if received_bytes >= wanted_bytes:
            until, wanted_bytes = (
                _in(limits.window_seconds),
                received_bytes + limits.window_bytes,
            )
        if chunk:
            yield chunk
        if not event.get("more_body", False):
            return


def _in(seconds: float) -> float:
    return asyncio.get_running_loop().time() + seconds


@dataclass
class BodyBudget:
    """The bytes of the bodies on their way to the SuperLink, which keeps each until it is whole.

    At most ``most_bytes`` of all nodes, ``node_bytes`` of one, and ``node_requests`` requests of
    one. What has no room waits, unread, for ``wait_seconds``: below the 30 after which Flower's
    node gives up on a write.
    """

    most_bytes: int = 2**26
    node_bytes: int = 2**24
    node_requests: int = 16
    wait_seconds: float = 15.0
    _bytes: Counter[str] = field(default_factory=Counter)
    _requests: Counter[str] = field(default_factory=Counter)
    _released: asyncio.Event = field(default_factory=asyncio.Event)

    @asynccontextmanager
    async def request(self, node: str) -> AsyncIterator[None]:
        """Count a request of a node while it is answered. Raises Refused if it has too many."""
        if self._requests[node] >= self.node_requests:
            raise Refused(503, "Too many requests of this node are open.")
        self._requests[node] += 1
        try:
            yield
        finally:
            _subtract(self._requests, node, 1)

    @asynccontextmanager
    async def body(self, node: str, length: int) -> AsyncIterator[None]:
        """Keep room for a body of ``length`` bytes. Raises Refused if there is none for long."""
        counted = length if length > _SMALL_BYTES else 0
        until = time.monotonic() + self.wait_seconds
        while counted and not self._has_room(node, counted):
            try:
                async with asyncio.timeout(until - time.monotonic()):
                    await self._released.wait()
            except TimeoutError as error:
                raise Refused(503, "Too many uploads are on their way; try again.") from error
        self._bytes[node] += counted
        try:
            yield
        finally:
            _subtract(self._bytes, node, counted)
            # Whoever waits now looks once; whoever waits later gets the next event.
            self._released.set()
            self._released = asyncio.Event()

    def _has_room(self, node: str, length: int) -> bool:
        within = self._bytes.total() + length <= self.most_bytes
        return within and self._bytes[node] + length <= self.node_bytes


def _subtract(counter: Counter[str], node: str, amount: int) -> None:
    counter[node] -= amount
    if not counter[node]:
        del counter[node]
