"""What passes the gate: which requests, which headers, how many bytes, for how long."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass

import httpx
from starlette.types import Receive, Scope, Send

CALLS = (
    "activate-node",
    "deactivate-node",
    "send-node-heartbeat",
    "pull-messages",
    "push-messages",
    "get-run",
    "get-fab",
    "push-object",
    "pull-object",
    "confirm-message-received",
)
"""The requests of a registered node."""
ALLOWED_PATHS = frozenset(f"/v1/fleet/{call}".encode() for call in CALLS)
_REGISTERING = frozenset({b"/v1/fleet/register-node", b"/v1/fleet/unregister-node"})
_MOST_HEADERS = 64
_FORWARDED = frozenset({b"content-type", b"content-length", b"accept", b"user-agent"})
_HOP_BY_HOP = frozenset(
    b"connection keep-alive proxy-authenticate proxy-authorization proxy-connection te trailer "
    b"transfer-encoding upgrade".split()
)

Headers = list[tuple[bytes, bytes]]


@dataclass(frozen=True)
class RequestLimits:
    """The largest body in bytes, and the longest times in seconds.

    ``seconds`` is for a whole request, ``idle_seconds`` for one side that waits for the other.
    Flower's own bodies have at most some 5 MiB.
    """

    body_bytes: int = 2**26
    seconds: float = 300.0
    idle_seconds: float = 60.0


@dataclass(eq=False)
class Refused(Exception):
    """A request that the gate answers itself: an HTTP status and a sentence."""

    status: int
    reason: str


def body_length(scope: Scope, most_body_bytes: int) -> int | None:
    """Refuse a request that is not allowed; returns the body's bytes, None if it is chunked.

    Raises:
        Refused: with the status and the reason.
    """
    if scope.get("raw_path") in _REGISTERING:
        # As the SuperLink itself answers: on a 403 Flower's node hangs instead of ending.
        raise Refused(412, "The server's owner registers nodes: send a public key to the owner.")
    # Compared as sent, before anything is decoded or normalised: a path that differs by an escape,
    # a dot, a slash, a capital, a query or a host is another path, and is refused.
    extended = scope["query_string"] or scope.get("root_path")
    if scope.get("raw_path") not in ALLOWED_PATHS or extended:
        raise Refused(403, "The gate forwards only the requests of a registered Flower node.")
    if scope["method"] != "POST":
        raise Refused(405, "Flower's nodes use only POST.")
    headers: Headers = scope["headers"]
    if len(headers) > _MOST_HEADERS:
        raise Refused(431, f"The request has more than {_MOST_HEADERS} headers.")
    lengths = [value for name, value in headers if name == b"content-length"]
    chunked = any(name == b"transfer-encoding" for name, _ in headers)
    if len(lengths) + chunked != 1 or not all(value.isdigit() for value in lengths):
        raise Refused(400, "The request must state one length, or come in chunks.")
    if chunked:
        return None
    if int(lengths[0]) > most_body_bytes:
        raise _too_large(most_body_bytes)
    return int(lengths[0])


def _too_large(most_body_bytes: int) -> Refused:
    return Refused(413, f"The body has more than {most_body_bytes} bytes.")


async def body(receive: Receive, length: int | None, limits: RequestLimits) -> AsyncIterator[bytes]:
    """The chunks of a request's body.

    Raises:
        Refused: it is too long, too slow or not complete.
    """
    received_bytes = 0
    while True:
        try:
            async with asyncio.timeout(limits.idle_seconds):
                event = await receive()
        except TimeoutError as error:
            raise Refused(408, f"Nothing came for {limits.idle_seconds:.0f} seconds.") from error
        if event["type"] == "http.disconnect":
            raise Refused(400, "The node disconnected before its request was complete.")
        chunk: bytes = event.get("body", b"")
        received_bytes += len(chunk)
        if received_bytes > (limits.body_bytes if length is None else length):
            raise _too_large(limits.body_bytes)
        if chunk:
            yield chunk
        if not event.get("more_body", False):
            return


def forwarded_headers(scope: Scope) -> Headers:
    """The headers for the SuperLink: those that Flower's nodes send, and the node's address."""
    headers: Headers = scope["headers"]
    dropped = _named_in_connection(headers)
    forwarded = [
        (name, value)
        for name, value in headers
        if name not in dropped and (name in _FORWARDED or name.startswith(b"flwr-"))
    ]
    # Only for the SuperLink's log; what the request itself says about its origin is dropped.
    client = scope.get("client")
    return [*forwarded, (b"x-forwarded-for", client[0].encode())] if client else forwarded


def returned_headers(headers: Headers) -> Headers:
    """The headers of a reply for the node."""
    lower = [(name.lower(), value) for name, value in headers]
    dropped = _HOP_BY_HOP | _named_in_connection(lower) | {b"date", b"server"}
    return [(name, value) for name, value in lower if name not in dropped]


def _named_in_connection(headers: Iterable[tuple[bytes, bytes]]) -> frozenset[bytes]:
    values = [value for name, value in headers if name == b"connection"]
    return frozenset(name.strip().lower() for value in values for name in value.split(b","))


def refusal(error: Exception) -> Refused:
    """The answer to a request that failed; raises an error that is none of a request's."""
    if isinstance(error, Refused):
        return error
    # A node tries again after 502, 503 and 504, and gives up after anything else.
    if isinstance(error, httpx.PoolTimeout):
        return Refused(503, "Too many requests wait for the SuperLink.")
    if isinstance(error, (httpx.TimeoutException, TimeoutError)):
        return Refused(504, "The SuperLink, or the node, took too long.")
    if isinstance(error, httpx.TransportError):
        return Refused(502, "The SuperLink cannot be reached.")
    raise error


async def send_refusal(refused: Refused, send: Send) -> None:
    """Answer a request with a refusal, in the form of Flower's own errors."""
    # The keys are those of Flower's own errors, so that its commands print the sentence.
    content = json.dumps({"code": refused.status, "detail": refused.reason}).encode() + b"\n"
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(content))]
    if refused.status == 405:
        headers.append((b"allow", b"POST"))
    if refused.status in (400, 408, 431):
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "http.response.body", "body": content})
