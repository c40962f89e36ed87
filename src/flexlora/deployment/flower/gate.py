"""The gate, an allow-list proxy before Flower's SuperLink: it forwards only requests of nodes.

A SuperLink answers nodes (``/v1/fleet``), the command ``flwr`` (``/v1/control``) and its own
processes (``/v1/runtime``) on one port, and authenticates only the first: anyone who reaches the
port can run code on every node. So it listens on loopback, and this proxy on the network. It
forwards ten requests, by their exact bytes, without the two with which a node whose key is not
registered would register itself.
"""

import argparse
import asyncio
import contextlib
import functools
import logging
import signal
import socket
import ssl
import sys
from asyncio import sslproto
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import urlsplit

from flexlora import addresses
from flexlora.deployment.certificates import ServerKeys
from flexlora.deployment.key_files import check_private
from flexlora.errors import ConfigError, FlexloraError
from flexlora.storage import write_atomically

try:
    import httpx
    import uvicorn
    from starlette.types import Message, Receive, Scope, Send
    from uvicorn.protocols.http.h11_impl import H11Protocol
except ImportError as error:
    raise ConfigError(
        "The gate needs packages that come with Flower; install them with: "
        "pip install 'flexlora[flower]'."
    ) from error

from flexlora.deployment.flower import bodies, gate_rules, reception
from flexlora.deployment.flower.bodies import BodyBudget
from flexlora.deployment.flower.connections import Connection, ConnectionLimits, Door
from flexlora.deployment.flower.gate_rules import Refused, RequestLimits
from flexlora.deployment.flower.log_rate import LogRate
from flexlora.deployment.flower.long_poll import (
    MOST_WAITING_BYTES,
    NOTHING_YET,
    LongPoll,
    body_chunks,
)
from flexlora.deployment.flower.reception import Reception
from flexlora.deployment.flower.served_certificate import ServedCertificate
from flexlora.deployment.flower.signatures import RegisteredKeys, Signatures

_MOST_HEADER_BYTES = 16384
_MOST_WAITING_CONNECTIONS = 512
_UPSTREAM_CONNECTIONS = 128
# Shorter than the five seconds after which the SuperLink's server closes an idle connection.
_KEEPALIVE_SECONDS = 2.0
_TLS_BUFFER_BYTES = 32768
_ANYBODY = "anybody"
_CONNECTION = "connection"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Gate:
    """An ASGI application that forwards the ten calls of a registered node to one SuperLink.

    With ``signatures`` a request that no registered node has signed is refused before its body is
    read. With a ``reception`` it answers one more request itself, a client's hello.
    """

    upstream: str
    client: httpx.AsyncClient
    limits: RequestLimits
    long_poll: LongPoll
    reception: Reception | None = None
    signatures: Signatures | None = None
    budget: BodyBudget = field(default_factory=BodyBudget)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or start and end with the server."""
        if scope["type"] == "lifespan":
            await self._live(receive, send)
            return
        if scope["type"] != "http":
            raise ConfigError(f"The gate accepts only HTTP, not '{scope['type']}'.")
        connection: Connection | None = scope.get("state", {}).get(_CONNECTION)
        with contextlib.nullcontext() if connection is None else connection.request():
            if self.reception is not None and reception.is_hello(scope):
                await self.reception.answer(scope, send)
            else:
                await self._answer(scope, receive, send, connection)

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self.client.aclose()
        await send({"type": "lifespan.shutdown.complete"})

    async def _answer(
        self, scope: Scope, receive: Receive, send: Send, connection: Connection | None
    ) -> None:
        begun = False

        async def answer(message: Message) -> None:
            nonlocal begun
            begun = True
            async with asyncio.timeout(self.limits.idle_seconds):
                await send(message)

        try:
            length = gate_rules.body_length(scope, self.limits)
            node = self._node(scope, connection)
            async with self.budget.request(node), asyncio.timeout(self.limits.seconds):
                async with self.budget.body(node, length):
                    reply = await self._reply(scope, receive, length)
                await self._return(reply, answer)
        except Exception as error:  # ``refusal`` raises what is no fault of the request
            refused = gate_rules.refusal(error)
            address = (scope.get("client") or ("?",))[0]
            request = f"{scope['method'][:20]} {scope.get('raw_path', b'')[:80]!r}"
            _log.warning("%s from %s: %d, %s", request, address, refused.status, refused.reason)
            # An answer that broke off stays incomplete: the server then closes the connection, and
            # the node sees that the answer is not whole.
            if not begun:
                await gate_rules.send_refusal(refused, send)

    def _node(self, scope: Scope, connection: Connection | None) -> str:
        """Who sends a request, from its headers alone. Raises Refused if nobody may."""
        if self.signatures is None:
            return _ANYBODY
        node = self.signatures.signer(scope["raw_path"], scope["headers"])
        if connection is not None:
            connection.prove(node)
        return node

    async def _reply(self, scope: Scope, receive: Receive, length: int) -> httpx.Response:
        """The SuperLink's reply; while that is "nothing yet", it is polled again for a while."""
        body = bodies.body(receive, length, self.limits)
        nothing = NOTHING_YET.get(scope["raw_path"])
        if nothing is None or length > MOST_WAITING_BYTES:
            return await self._forward(scope, body)
        content = b"".join([chunk async for chunk in body])
        poll = functools.partial(self._forward, scope, content)
        if (reply := await self.long_poll.reply(poll, nothing, receive)) is None:
            raise Refused(400, "The node disconnected before there was anything for it.")
        return reply

    async def _forward(self, scope: Scope, body: AsyncIterator[bytes] | bytes) -> httpx.Response:
        url = self.upstream + scope["raw_path"].decode("ascii")
        headers = gate_rules.forwarded_headers(scope)
        request = self.client.build_request("POST", url, headers=headers, content=body)
        return await self.client.send(request, stream=True)

    async def _return(self, reply: httpx.Response, send: Send) -> None:
        try:
            start = {"type": "http.response.start", "status": reply.status_code}
            await send({**start, "headers": gate_rules.returned_headers(reply.headers.raw)})
            async for chunk in body_chunks(reply):
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        finally:
            await reply.aclose()
        await send({"type": "http.response.body", "body": b""})


def app(
    upstream: str,
    verify: Path | None,
    limits: RequestLimits | None = None,
    long_poll: LongPoll | None = None,
    run: Path | None = None,
) -> Gate:
    """The gate to the SuperLink at ``upstream``, as an ASGI application.

    Args:
        upstream: scheme, host and port, as https://127.0.0.1:8000; http only to loopback.
        verify: the CA certificate that must have signed the SuperLink's; None with http.
        limits: bytes and times of a request.
        long_poll: how long a node's request waits while the SuperLink has nothing for it.
        run: the folder of the served run, by which the gate knows the registered keys. Without it
            signatures are left to the SuperLink, which looks at them when it has the whole body.

    Raises:
        ConfigError: the upstream is not such an address, or ``verify`` does not go with it.
    """
    _check_upstream(upstream, verify)
    limits = limits or RequestLimits()
    client = httpx.AsyncClient(
        verify=True if verify is None else ssl.create_default_context(cafile=verify),
        # The environment may name a proxy, and the SuperLink is never behind one.
        trust_env=False,
        follow_redirects=False,
        headers={"accept-encoding": "identity"},
        timeout=httpx.Timeout(limits.idle_seconds, connect=10.0),
        limits=httpx.Limits(
            max_connections=_UPSTREAM_CONNECTIONS, keepalive_expiry=_KEEPALIVE_SECONDS
        ),
    )
    gate = Gate(upstream.rstrip("/"), client, limits, long_poll or LongPoll())
    if run is None:
        # One "node": everybody shares its limits.
        return replace(gate, budget=BodyBudget(node_bytes=2**26, node_requests=256))
    registered = RegisteredKeys(run)
    return replace(gate, reception=Reception(run, registered), signatures=Signatures(registered))


def serve(
    gate: Gate,
    host: str,
    port: int,
    keys: ServerKeys | None,
    ready: Path | None = None,
    limits: ConnectionLimits | None = None,
) -> None:
    """Serve the gate until the process gets SIGINT or SIGTERM.

    Port 0 takes any free one. When connections are accepted, ``ready`` is written with HOST:PORT,
    and it is removed at the end. TLS is 1.2 or newer, with the server's certificate; a renewed
    certificate is used from the next connection on.

    Raises:
        ConfigError: without ``keys``, and so without TLS, the host is not a loopback address.
        ProtocolError: other users may read the private key, or the files do not go together.
        OSError: the address cannot be listened on.
    """
    if keys is None and not addresses.is_loopback(host):
        raise ConfigError(
            f"The gate does not listen on {host} without TLS: a node's signature covers only the "
            "time, so anyone who reads it could send requests in the node's name; give the "
            "server's keys, or listen on 127.0.0.1."
        )
    certificate = None
    if keys is not None:
        check_private(keys.key)
        run = None if gate.reception is None else gate.reception.folder
        certificate = ServedCertificate(keys, run)
    server = uvicorn.Server(_server_config(gate))
    gate.long_poll.ending = lambda: server.should_exit
    door = Door(limits or ConnectionLimits.of_process())
    with addresses.listener(host, port, _MOST_WAITING_CONNECTIONS) as listener:
        address = addresses.joined(host, listener.getsockname()[1])
        _log.info("The gate listens on %s, for %d connections.", address, door.limits.total)
        try:
            if ready is not None:
                write_atomically(ready, f"{address}\n".encode())
            asyncio.run(_serve(server, door, listener, certificate))
        finally:
            if ready is not None:
                ready.unlink(missing_ok=True)


async def _serve(
    server: uvicorn.Server,
    door: Door,
    listener: socket.socket,
    certificate: ServedCertificate | None,
) -> None:
    """Accept connections for the server, which parses and answers what comes on them."""

    def protocol(connection: Connection) -> asyncio.Protocol:
        state = {_CONNECTION: connection}
        return H11Protocol(server.config, server.server_state, state)

    def context() -> ssl.SSLContext | None:
        return None if certificate is None else certificate.context

    def ended(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception() is not None:
            server.should_exit = True  # whoever started the gate starts it again

    tasks = [asyncio.create_task(door.accept(listener, context, protocol))]
    if certificate is not None:
        tasks.append(asyncio.create_task(certificate.watch()))
    for task in tasks:
        task.add_done_callback(ended)
    try:
        await server.serve(sockets=[])
    finally:
        for task in tasks:
            task.cancel()
    for task in tasks:
        with contextlib.suppress(asyncio.CancelledError):
            await task


def _server_config(gate: Gate) -> uvicorn.Config:
    config = uvicorn.Config(
        gate,
        http="h11",  # the strict parser; it also bounds a request's headers
        h11_max_incomplete_event_size=_MOST_HEADER_BYTES,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        # A node whose request waits gets "nothing yet" within three seconds.
        timeout_graceful_shutdown=3,
    )
    config.load()
    return config


def _check_upstream(upstream: str, verify: Path | None) -> None:
    parts = urlsplit(upstream)
    bare = not (parts.path.strip("/") or parts.query or parts.fragment or "@" in parts.netloc)
    if parts.scheme not in ("http", "https") or not parts.hostname or not parts.port or not bare:
        raise ConfigError(
            f"'{upstream}' is not the address of a SuperLink; give scheme, host and port, as in "
            "https://127.0.0.1:8000."
        )
    if parts.scheme == "http" and not addresses.is_loopback(parts.hostname):
        raise ConfigError(
            f"The gate uses plain HTTP only to a SuperLink on its own machine, not to "
            f"'{upstream}'; give an https address."
        )
    if (verify is None) != (parts.scheme == "http"):
        raise ConfigError(
            f"With '{upstream}', the CA certificate is {verify}; an https address needs one, and "
            "an http address has no use for it."
        )


def _address(text: str) -> tuple[str, int]:
    address = addresses.split(text)
    if address is None:
        raise argparse.ArgumentTypeError(f"'{text}' is not HOST:PORT.")
    return address


def main() -> None:
    """Run the gate as a process of its own, until SIGINT or SIGTERM."""
    parser = argparse.ArgumentParser(description="Forward only requests of nodes to a SuperLink.")
    parser.add_argument("--listen", type=_address, required=True, metavar="HOST:PORT")
    parser.add_argument("--upstream", required=True, help="as https://127.0.0.1:8000")
    parser.add_argument("--ca", type=Path, help="the CA's certificate, as ca.crt")
    parser.add_argument("--cert", type=Path, help="the gate's certificate, as server.crt")
    parser.add_argument("--key", type=Path, help="its private key, as server.key")
    parser.add_argument("--upstream-ca", type=Path, help="the SuperLink's CA, if it is another")
    parser.add_argument("--run", type=Path, help="the folder of the served run")
    parser.add_argument("--ready", type=Path, help="a file to write when connections are accepted")
    args = parser.parse_args()
    files = (args.ca, args.cert, args.key)
    if None in files and any(files):
        parser.error("--ca, --cert and --key go together.")
    _begin_log()
    # By default SIGTERM would end the process before it has tidied up.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    # asyncio reserves 256 KiB for each TLS connection, of strangers too.
    sslproto.SSLProtocol.max_size = _TLS_BUFFER_BYTES
    try:
        keys = None if None in files else ServerKeys(*files)
        verify = (args.upstream_ca or args.ca) if args.upstream.startswith("https:") else None
        gate = app(args.upstream, verify, run=args.run)
        serve(gate, args.listen[0], args.listen[1], keys, args.ready)
    except (FlexloraError, OSError) as error:
        parser.exit(2, f"{error}\n")
    except KeyboardInterrupt:
        pass


def _begin_log() -> None:
    """Write a log that strangers can neither fill nor forge."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    handler.addFilter(LogRate())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    # httpx logs every request; the SuperLink is polled several times a second.
    logging.getLogger("httpx").setLevel(logging.WARNING)


if __name__ == "__main__":
    main()
