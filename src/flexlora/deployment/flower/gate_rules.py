"""What passes the gate: which requests, which headers, how many bytes, for how long."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass

import httpx
from starlette.types import Scope, Send

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
_PUSH_OBJECT, _PUSH_MESSAGES = b"/v1/fleet/push-object", b"/v1/fleet/push-messages"
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
    """The largest bodies in bytes, and the longest times in seconds.

    Flower sends a payload in objects of 5 MiB (``object_bytes``), the list of a message's objects,
    some 70 bytes for each (``message_bytes``), and a few hundred bytes with every other call
    (``other_bytes``). ``seconds`` is for a whole request, ``idle_seconds`` for the SuperLink's
    reply and for a node that reads it. A body must bring ``window_bytes`` more, or end, in every
    ``window_seconds``.
    """

    object_bytes: int = 5 * 2**20 + 2**16
    message_bytes: int = 2**18
    other_bytes: int = 2**14
    seconds: float = 300.0
    idle_seconds: float = 60.0
    window_seconds: float = 20.0
    window_bytes: int = 2**16

    def body_bytes(self, path: bytes) -> int:
        """The largest body of a call."""
        if path == _PUSH_OBJECT:
            return self.object_bytes
        return self.message_bytes if path == _PUSH_MESSAGES else self.other_bytes


@dataclass(eq=False)
class Refused(Exception):
    """A request that the gate answers itself: an HTTP status and a sentence."""

    status: int
    reason: str


def body_length(scope: Scope, limits: RequestLimits) -> int:
    """Refuse a request that is not allowed; returns the bytes of its body.

    Raises:
        Refused: with the status and the reason.
    """
    path: bytes = scope.get("raw_path", b"")
    if path in _REGISTERING:
        # As the SuperLink itself answers: on a 403 Flower's node hangs instead of ending.
        raise Refused(412, "The server's owner registers nodes: send a public key to the owner.")
    # Compared as sent, before anything is decoded or normalised: a path that differs by an escape,
    # a dot, a slash, a capital, a query or a host is another path, and is refused.
    if path not in ALLOWED_PATHS or scope["query_string"] or scope.get("root_path"):
        raise Refused(403, "The gate forwards only the requests of a registered Flower node.")
    if scope["method"] != "POST":
        raise Refused(405, "Flower's nodes use only POST.")
    headers: Headers = scope["headers"]
    if len(headers) > _MOST_HEADERS:
        raise Refused(431, f"The request has more than {_MOST_HEADERS} headers.")
    lengths = [value for name, value in headers if name == b"content-length"]
    chunked = any(name == b"transfer-encoding" for name, _ in headers)
    if chunked and not lengths:
        raise Refused(411, "The request must state the length of its body; Flower's nodes do.")
    if len(lengths) != 1 or chunked or not (lengths[0].isdigit() and len(lengths[0]) < 20):
        raise Refused(400, "The request must state one length.")
    most_bytes = limits.body_bytes(path)
    if int(lengths[0]) > most_bytes:
        raise Refused(413, f"The body has more than {most_bytes} bytes.")
    return int(lengths[0])


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
    if refused.status == 503:
        headers.append((b"retry-after", b"1"))
    # Nothing more of the request is read, and nothing else is taken from whoever sent it.
    headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "http.response.body", "body": content})
