"""The connections of the gate: accepted, bounded in number, and closed when nothing comes.

A connection is a stranger's until a request on it has the signature of a registered node. There
are at most ``strangers`` of them; a new one takes the place of the oldest of the address that has
the most, and waits to be accepted until that is ``grace_seconds`` old. So whoever opens many
connections closes his own, and nodes, whose first request comes at once, keep theirs. An address
may have any number, as the nodes of a site behind one router share one; what it opens faster than
``new_of_address`` a second is closed unread.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import ssl
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from ipaddress import IPv6Address, ip_address
from typing import Final

from flexlora.deployment.flower.gate_rules import Refused

_LOOK_SECONDS: Final = 0.5
_NO_DESCRIPTOR_SECONDS: Final = 0.1
_RESERVED_DESCRIPTORS: Final = 256
"""For connections to the SuperLink, files, and the interpreter."""
_NO_LISTENER: Final = (errno.EBADF, errno.EINVAL, errno.ENOTSOCK)
_NO_ROOM: Final = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_MOST_CONNECTIONS: Final = 4096
_MOST_ADDRESSES: Final = 4096


@dataclass(frozen=True)
class ConnectionLimits:
    """Numbers of connections, and seconds until a TLS handshake and a request's headers are there.

    The time for headers runs from the handshake, and from the end of the last request.
    """

    total: int = _MOST_CONNECTIONS
    strangers: int = 256
    of_node: int = 32
    new_of_address: float = 512.0
    new_at_once: float = 2048.0
    grace_seconds: float = 0.25
    handshake_seconds: float = 10.0
    headers_seconds: float = 10.0
    close_seconds: float = 0.5

    @staticmethod
    def of_process() -> ConnectionLimits:
        """The limits that this process's descriptors allow, raised to what the system permits."""
        free = max(_raised_descriptors() - _RESERVED_DESCRIPTORS, 64)
        total = min(free, _MOST_CONNECTIONS)
        return ConnectionLimits(total, min(ConnectionLimits.strangers, total // 2))


def _raised_descriptors() -> int:
    """Raise the limit of open files to the hard one; returns it."""
    try:
        import resource
    except ImportError:  # Windows, which has no such limit
        return _MOST_CONNECTIONS + _RESERVED_DESCRIPTORS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MOST_CONNECTIONS + _RESERVED_DESCRIPTORS
    wanted = most if hard == resource.RLIM_INFINITY else min(hard, most)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return most if soft == resource.RLIM_INFINITY else soft


@dataclass(eq=False)
class Connection:
    """An accepted connection; ``node`` is the key of the node that it was proven to come from."""

    door: Door
    address: str
    accepted: float
    until: float
    node: str | None = None
    requests: int = 0
    opening: asyncio.Task[None] | None = None
    transport: asyncio.BaseTransport | None = None

    @contextlib.contextmanager
    def request(self) -> Iterator[None]:
        """A request on this connection is answered: meanwhile its own limits of time hold."""
        self.requests += 1
        try:
            yield
        finally:
            self.requests -= 1
            self.until = self.door.now() + self.door.limits.headers_seconds

    def prove(self, node: str) -> None:
        """A request on it was signed by this node. Raises Refused if the node has too many."""
        if self.node != node:
            self.door.prove(self, node)

    def close(self) -> None:
        """Close it at once, whatever is on its way."""
        if isinstance(self.transport, asyncio.WriteTransport):
            self.transport.abort()
        elif self.opening is not None:
            self.opening.cancel()
        self.door.forget(self)


@dataclass
class Door:
    """Accepts connections at a listening socket, within limits."""

    limits: ConnectionLimits
    now: Callable[[], float] = lambda: asyncio.get_running_loop().time()
    # Dicts are ordered: the first stranger of an address is the oldest.
    _strangers: dict[str, dict[Connection, None]] = field(default_factory=dict)
    _nodes: dict[str, dict[Connection, None]] = field(default_factory=dict)
    _rates: _Rates = field(init=False)

    def __post_init__(self) -> None:
        self._rates = _Rates(self.limits.new_of_address, self.limits.new_at_once)

    @property
    def strangers(self) -> int:
        """How many connections have not shown a signature."""
        return sum(map(len, self._strangers.values()))

    @property
    def of_nodes(self) -> int:
        """How many connections have."""
        return sum(map(len, self._nodes.values()))

    async def admit(self, host: str) -> Connection | None:
        """Count a new connection, which may close an older one; None if it is one too many."""
        address = network_of(host)
        if not self._rates.takes(address, self.now()):
            return None
        while (oldest := self._in_the_way()) is not None:
            if (age := self.now() - oldest.accepted) < self.limits.grace_seconds:
                await asyncio.sleep(self.limits.grace_seconds - age)
            else:
                oldest.close()
        now = self.now()
        connection = Connection(self, address, now, now + self.limits.handshake_seconds)
        self._strangers.setdefault(address, {})[connection] = None
        return connection

    def _in_the_way(self) -> Connection | None:
        """The stranger that has to make room for another one; None if there is room."""
        room = min(self.limits.strangers, self.limits.total - self.of_nodes)
        return None if self.strangers < room else self._oldest()

    def _oldest(self) -> Connection | None:
        """The oldest stranger of the address that has the most."""
        if not self._strangers:
            return None
        address = max(self._strangers, key=lambda address: len(self._strangers[address]))
        return next(iter(self._strangers[address]))

    def prove(self, connection: Connection, node: str) -> None:
        """See ``Connection.prove``."""
        of_node = self._nodes.get(node, {})
        if len(of_node) >= self.limits.of_node:
            idle = [each for each in of_node if not each.requests]
            if not idle:
                raise Refused(503, "This node has too many connections.")
            idle[0].close()
        if self.of_nodes >= self.limits.total - self.limits.strangers:
            raise Refused(503, "Too many nodes are connected.")
        self.forget(connection)
        connection.node = node
        self._nodes.setdefault(node, {})[connection] = None

    def forget(self, connection: Connection) -> None:
        """Count a connection no more."""
        of, key = (
            (self._strangers, connection.address)
            if connection.node is None
            else (self._nodes, connection.node)
        )
        if key in of:
            of[key].pop(connection, None)
            if not of[key]:
                del of[key]

    async def accept(
        self,
        listener: socket.socket,
        context: Callable[[], ssl.SSLContext | None],
        make: Callable[[Connection], asyncio.Protocol],
    ) -> None:
        """Accept connections for ever; ``context`` gives the TLS settings of the next one."""
        loop = asyncio.get_running_loop()
        listener.setblocking(False)
        closing = loop.create_task(self._close_late())
        try:
            while True:
                # One at a time, so that those who are already connected get on.
                await asyncio.sleep(0)
                try:
                    accepted, peer = await loop.sock_accept(listener)
                except OSError as error:
                    if error.errno in _NO_LISTENER:
                        raise
                    if error.errno in _NO_ROOM:
                        if (oldest := self._oldest()) is not None:
                            oldest.close()
                        await asyncio.sleep(_NO_DESCRIPTOR_SECONDS)
                    continue  # in all other cases whoever called has gone
                connection = await self.admit(str(peer[0]))
                if connection is None:
                    accepted.close()
                    continue
                opening = self._open(connection, accepted, context(), make)
                connection.opening = loop.create_task(opening)
        finally:
            closing.cancel()

    async def _open(
        self,
        connection: Connection,
        accepted: socket.socket,
        context: ssl.SSLContext | None,
        make: Callable[[Connection], asyncio.Protocol],
    ) -> None:
        loop = asyncio.get_running_loop()
        limits = self.limits
        with contextlib.suppress(OSError):  # whoever called has gone
            accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            await loop.connect_accepted_socket(
                lambda: _Watched(connection, make(connection)),
                accepted,
                ssl=context,
                ssl_handshake_timeout=limits.handshake_seconds if context else None,
                ssl_shutdown_timeout=limits.close_seconds if context else None,
            )
        except OSError:  # no TLS, not in time, or gone again
            self.forget(connection)
        except asyncio.CancelledError:  # its place was taken
            self.forget(connection)

    async def _close_late(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            now = self.now()
            for group in [*self._strangers.values(), *self._nodes.values()]:
                for connection in list(group):
                    if not connection.requests and connection.until < now:
                        connection.close()


@dataclass
class _Rates:
    """How many new connections each address may open now: ``most`` at once, then ``a_second``."""

    a_second: float
    most: float
    # How many are left, and when that was; the address that came last is last.
    _left: dict[str, tuple[float, float]] = field(default_factory=dict)

    def takes(self, address: str, now: float) -> bool:
        """Whether one more may be opened, which is then counted."""
        left, at = self._left.pop(address, (self.most, now))
        left = min(left + (now - at) * self.a_second, self.most)
        if len(self._left) >= _MOST_ADDRESSES:
            del self._left[next(iter(self._left))]
        self._left[address] = max(left - 1, 0.0), now
        return left >= 1


class _Watched(asyncio.Protocol):
    """A protocol whose connection is counted until it is lost."""

    def __init__(self, connection: Connection, protocol: asyncio.Protocol) -> None:
        self._connection, self._protocol = connection, protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        connection = self._connection
        connection.transport = transport
        connection.until = connection.door.now() + connection.door.limits.headers_seconds
        self._protocol.connection_made(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._connection.door.forget(self._connection)
        self._protocol.connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._protocol.data_received(data)

    def eof_received(self) -> bool | None:
        return self._protocol.eof_received()

    def pause_writing(self) -> None:
        self._protocol.pause_writing()

    def resume_writing(self) -> None:
        self._protocol.resume_writing()


def network_of(host: str) -> str:
    """The address, or its network: a site has one IPv4 address, and 2**64 of IPv6."""
    try:
        address = ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped is not None:
            return str(address.ipv4_mapped)
        return str(IPv6Address(int(address) >> 64 << 64))
    return host
