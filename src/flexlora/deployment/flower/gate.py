"""The gate in front of Flower's SuperLink: nodes reach what nodes need, and nothing else.

A SuperLink answers nodes (``/v1/fleet``), the command ``flwr`` (``/v1/control``) and its own
processes (``/v1/runtime``) on one port, and asks for a node's key only on the first: whoever
reaches the port can have code run on every node. So it listens on loopback, and this proxy on the
network. Ten requests pass, by their exact bytes; the two by which a node without a registered key
would register itself do not.
"""

import argparse
import asyncio
import functools
import json
import logging
import signal
import socket
import ssl
import sys
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit

from flexlora.deployment.flower.long_poll import MOST_QUESTION_BYTES, NOTHING_YET, Held, parts
from flexlora.deployment.keys import ServerKeys, check_private
from flexlora.errors import ConfigError

try:
    import httpx
    import uvicorn
    from starlette.types import ASGIApp, Message, Receive, Scope, Send
except ImportError as error:
    raise ConfigError(
        "The gate needs the packages that Flower brings; install them with: "
        "pip install 'flexlora[flower]'."
    ) from error

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
_OPEN = frozenset(f"/v1/fleet/{call}".encode() for call in CALLS)
_REGISTERING = frozenset({b"/v1/fleet/register-node", b"/v1/fleet/unregister-node"})
_MOST_HEADERS = 64
_MOST_HEADER_BYTES = 16384
_MOST_CONNECTIONS = 4096
_UPSTREAM_CONNECTIONS = 128
# What a request may take in all, and how long one side may keep the other waiting meanwhile.
_SECONDS, _IDLE_SECONDS = 300.0, 60.0
# Shorter than the five seconds after which the SuperLink's server closes an idle connection.
_KEPT_SECONDS = 2.0
_PASSED = frozenset({b"content-type", b"content-length", b"accept", b"user-agent"})
_HOP_BY_HOP = frozenset(
    b"connection keep-alive proxy-authenticate proxy-authorization proxy-connection te trailer "
    b"transfer-encoding upgrade".split()
)
_CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"

_Headers = list[tuple[bytes, bytes]]
_log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Refused(Exception):
    """A request that gets an answer from the gate itself: an HTTP status and a sentence."""

    status: int
    reason: str


@dataclass(frozen=True)
class Gate:
    """An ASGI application that passes the ten calls of a registered node to one SuperLink."""

    upstream: str
    client: httpx.AsyncClient
    most_body_bytes: int
    held: Held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or open and close with the server."""
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        elif scope["type"] != "http":
            raise ConfigError(f"The gate speaks HTTP only, not '{scope['type']}'.")
        else:
            await self._answer(scope, receive, send)

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self.client.aclose()
        await send({"type": "lifespan.shutdown.complete"})

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def answer(message: Message) -> None:
            nonlocal begun
            begun = True
            async with asyncio.timeout(_IDLE_SECONDS):
                await send(message)

        try:
            length = _check(scope, self.most_body_bytes)
            async with asyncio.timeout(_SECONDS):
                await self._pass(await self._replied(scope, receive, length), answer)
        except Exception as error:
            refused = _refusal(error)
            who = (scope.get("client") or ("?",))[0]
            what = f"{scope['method']} {scope.get('raw_path')!r}"
            _log.warning("%s from %s: %d, %s", what, who, refused.status, refused.reason)
            # An answer that is cut off is left incomplete: the server then closes the connection,
            # which a node takes for what it is.
            if not begun:
                await _refuse(refused, send)

    async def _replied(self, scope: Scope, receive: Receive, length: int | None) -> httpx.Response:
        """The SuperLink's reply; while that is "nothing yet", it is asked again for a while."""
        body = _body(receive, length, self.most_body_bytes)
        nothing = NOTHING_YET.get(scope["raw_path"])
        if nothing is None or length is None or length > MOST_QUESTION_BYTES:
            return await self._sent(scope, body)
        question = b"".join([part async for part in body])
        ask = functools.partial(self._sent, scope, question)
        if (reply := await self.held.answer(ask, nothing, receive)) is None:
            raise _Refused(400, "The node hung up before there was anything for it.")
        return reply

    async def _sent(self, scope: Scope, body: AsyncIterator[bytes] | bytes) -> httpx.Response:
        url = self.upstream + scope["raw_path"].decode("ascii")
        request = self.client.build_request("POST", url, headers=_onward(scope), content=body)
        return await self.client.send(request, stream=True)

    async def _pass(self, reply: httpx.Response, send: Send) -> None:
        try:
            start = {"type": "http.response.start", "status": reply.status_code}
            await send({**start, "headers": _back(reply.headers.raw)})
            async for chunk in parts(reply):
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        finally:
            await reply.aclose()
        await send({"type": "http.response.body", "body": b""})


def app(
    upstream: str, verify: Path | None, most_body_bytes: int = 2**26, held: Held | None = None
) -> ASGIApp:
    """The gate to the SuperLink at ``upstream``, as an ASGI application.

    Args:
        upstream: scheme, host and port, as https://127.0.0.1:8000; http only to loopback.
        verify: the CA certificate the SuperLink's own must be signed by; none with http.
        most_body_bytes: the largest body let through; Flower's own are at most some 5 MiB.
        held: how long a node's question is held while the SuperLink has nothing for it.

    Raises:
        ConfigError: the upstream is not such an address, or ``verify`` does not go with it.
    """
    _check_upstream(upstream, verify)
    trust = True if verify is None else ssl.create_default_context(cafile=verify)
    client = httpx.AsyncClient(
        verify=trust,
        # The environment may name a proxy, and the SuperLink is never behind one.
        trust_env=False,
        follow_redirects=False,
        headers={"accept-encoding": "identity"},
        timeout=httpx.Timeout(_IDLE_SECONDS, connect=10.0),
        limits=httpx.Limits(max_connections=_UPSTREAM_CONNECTIONS, keepalive_expiry=_KEPT_SECONDS),
    )
    return Gate(upstream.rstrip("/"), client, most_body_bytes, held or Held())


def serve(
    app: ASGIApp, host: str, port: int, keys: ServerKeys | None, ready: Path | None = None
) -> None:
    """Serve the gate until the process is told to end (SIGINT or SIGTERM).

    Port 0 takes a free one. When connections are taken, ``ready`` is written with HOST:PORT, and
    it is removed at the end. TLS is 1.2 or newer, with the server's certificate.

    Raises:
        ConfigError: without ``keys``, and so without TLS, the host is not a loopback address; or
            the private key is open to others.
        OSError: the address cannot be listened on.
    """
    if keys is None and not _is_loopback(host):
        raise ConfigError(
            f"The gate does not listen on {host} without TLS: a node's signature covers only the "
            "time, so whoever reads it could send requests in the node's name; give the "
            "server's keys, or listen on 127.0.0.1."
        )
    if keys is not None:
        check_private(keys.key)
    config = uvicorn.Config(
        app,
        http="h11",  # the strict parser; it also bounds a request's headers
        h11_max_incomplete_event_size=_MOST_HEADER_BYTES,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        limit_concurrency=_MOST_CONNECTIONS,
        # After three seconds a node that was told that there is nothing finds out by itself.
        timeout_graceful_shutdown=3,
        ssl_certfile=None if keys is None else keys.certificate,
        ssl_keyfile=None if keys is None else keys.key,
        ssl_ciphers=_CIPHERS,
    )
    config.load()
    if config.ssl is not None:
        config.ssl.minimum_version = ssl.TLSVersion.TLSv1_2
    server = uvicorn.Server(config)
    if isinstance(app, Gate):
        app.held.ending = lambda: server.should_exit
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, port), family=family, backlog=config.backlog) as listener:
        address = f"{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
        _log.info("The gate listens on %s.", address)
        try:
            if ready is not None:
                _write_whole(ready, address + "\n")
            server.run(sockets=[listener])
        finally:
            if ready is not None:
                ready.unlink(missing_ok=True)


def _check(scope: Scope, most_body_bytes: int) -> int | None:
    """Refuse what does not pass; returns the body's length in bytes, none if it is chunked."""
    if scope.get("raw_path") in _REGISTERING:
        # As the SuperLink itself answers: on a 403 Flower's node hangs instead of ending.
        raise _Refused(412, "Nodes are registered by the server's owner: hand in a public key.")
    # Compared as sent, before anything is decoded or normalised: what differs by an escape, a
    # dot, a slash, a capital, a query or a host is another path, and every other path is closed.
    if scope.get("raw_path") not in _OPEN or scope["query_string"] or scope.get("root_path"):
        raise _Refused(403, "Only the requests of a registered Flower node pass this gate.")
    if scope["method"] != "POST":
        raise _Refused(405, "Flower's nodes only POST.")
    headers: _Headers = scope["headers"]
    if len(headers) > _MOST_HEADERS:
        raise _Refused(431, f"The request has more than {_MOST_HEADERS} headers.")
    lengths = [value for name, value in headers if name == b"content-length"]
    chunked = any(name == b"transfer-encoding" for name, _ in headers)
    if len(lengths) + chunked != 1 or not all(value.isdigit() for value in lengths):
        raise _Refused(400, "The request must state one length, or come in chunks.")
    if chunked:
        return None
    if int(lengths[0]) > most_body_bytes:
        raise _too_large(most_body_bytes)
    return int(lengths[0])


def _too_large(most_body_bytes: int) -> _Refused:
    return _Refused(413, f"The body has more than {most_body_bytes} bytes.")


async def _body(receive: Receive, length: int | None, most: int) -> AsyncIterator[bytes]:
    taken = 0
    while True:
        try:
            async with asyncio.timeout(_IDLE_SECONDS):
                event = await receive()
        except TimeoutError as error:
            raise _Refused(408, f"Nothing came for {_IDLE_SECONDS:.0f} seconds.") from error
        if event["type"] == "http.disconnect":
            raise _Refused(400, "The node hung up before its request was whole.")
        chunk: bytes = event.get("body", b"")
        taken += len(chunk)
        if taken > (most if length is None else length):
            raise _too_large(most)
        if chunk:
            yield chunk
        if not event.get("more_body", False):
            return


def _onward(scope: Scope) -> _Headers:
    """The headers that the SuperLink gets: those Flower's nodes send, and whence they came."""
    headers: _Headers = scope["headers"]
    dropped = _named_in_connection(headers)
    kept = [
        (name, value)
        for name, value in headers
        if name not in dropped and (name in _PASSED or name.startswith(b"flwr-"))
    ]
    # Only for the SuperLink's log; what the request itself says about its origin is dropped.
    client = scope.get("client")
    return [*kept, (b"x-forwarded-for", client[0].encode())] if client else kept


def _back(headers: _Headers) -> _Headers:
    lower = [(name.lower(), value) for name, value in headers]
    dropped = _HOP_BY_HOP | _named_in_connection(lower) | {b"date", b"server"}
    return [(name, value) for name, value in lower if name not in dropped]


def _named_in_connection(headers: Iterable[tuple[bytes, bytes]]) -> frozenset[bytes]:
    values = [value for name, value in headers if name == b"connection"]
    return frozenset(name.strip().lower() for value in values for name in value.split(b","))


def _refusal(error: Exception) -> _Refused:
    if isinstance(error, _Refused):
        return error
    # A node tries again after 502, 503 and 504, and gives up after anything else.
    if isinstance(error, httpx.PoolTimeout):
        return _Refused(503, "Too many requests wait for the SuperLink.")
    if isinstance(error, (httpx.TimeoutException, TimeoutError)):
        return _Refused(504, "The SuperLink, or the node, took too long.")
    if isinstance(error, httpx.TransportError):
        return _Refused(502, "The SuperLink cannot be reached.")
    raise error


async def _refuse(refused: _Refused, send: Send) -> None:
    # The keys are those of Flower's own errors, so that its commands print the sentence.
    body = json.dumps({"code": refused.status, "detail": refused.reason}).encode() + b"\n"
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    if refused.status == 405:
        headers.append((b"allow", b"POST"))
    if refused.status in (400, 408, 431):
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _check_upstream(upstream: str, verify: Path | None) -> None:
    parts = urlsplit(upstream)
    bare = not (parts.path.strip("/") or parts.query or parts.fragment or "@" in parts.netloc)
    if parts.scheme not in ("http", "https") or not parts.hostname or not parts.port or not bare:
        raise ConfigError(
            f"'{upstream}' is not the address of a SuperLink; give scheme, host and port, as in "
            "https://127.0.0.1:8000."
        )
    if parts.scheme == "http" and not _is_loopback(parts.hostname):
        raise ConfigError(
            f"The gate speaks plain HTTP only to a SuperLink on its own machine, not to "
            f"'{upstream}'; give an https address."
        )
    if (verify is None) != (parts.scheme == "http"):
        raise ConfigError(
            f"With '{upstream}', the CA certificate is {verify}; an https address needs one, and "
            "an http address has no use for it."
        )


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def _write_whole(path: Path, text: str) -> None:
    draft = path.with_name(path.name + ".draft")
    draft.write_text(text)
    draft.replace(path)


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit():
        raise argparse.ArgumentTypeError(f"'{text}' is not HOST:PORT.")
    return host.strip("[]"), int(port)


def main() -> None:
    """Run the gate as a process of its own, until SIGINT or SIGTERM."""
    parser = argparse.ArgumentParser(description="Let only Flower's nodes through to a SuperLink.")
    parser.add_argument("--listen", type=_address, required=True, metavar="HOST:PORT")
    parser.add_argument("--upstream", required=True, help="as https://127.0.0.1:8000")
    parser.add_argument("--ca", type=Path, help="what signed the certificates, as ca.crt")
    parser.add_argument("--cert", type=Path, help="the gate's own, as server.crt")
    parser.add_argument("--key", type=Path, help="its private key, as server.key")
    parser.add_argument("--ready", type=Path, help="a file to write when connections are taken")
    args = parser.parse_args()
    files = (args.ca, args.cert, args.key)
    if None in files and any(files):
        parser.error("--ca, --cert and --key go together.")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    # By default SIGTERM would end the process before it has tidied up.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    # httpx tells of every request; the SuperLink is asked several times a second.
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        keys = None if None in files else ServerKeys(*files)
        verify = args.ca if args.upstream.startswith("https:") else None
        serve(app(args.upstream, verify), args.listen[0], args.listen[1], keys, args.ready)
    except (ValueError, OSError) as error:
        parser.exit(2, f"{error}\n")
    except KeyboardInterrupt:
        pass


if __name__ == "__main__":
    main()
