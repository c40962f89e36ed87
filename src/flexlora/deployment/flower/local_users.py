"""Keeps other users of the server's machine out of Flower's SuperLink.

The SuperLink authenticates nodes and nobody else: who reaches its port on loopback can start a
program of their own on the server and on every node, or read and send messages in the server's
name. Loopback is open to every user of the machine. So the system is asked for each request who
owns the other end of its connection.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Address = tuple[str, int]

GUARDED: Final = "/v1/flexlora/guarded"
"""A path at which this answers itself: a SuperLink that does not is not guarded."""

NODES: Final = "/v1/fleet/"
"""The path of the requests of nodes."""

_TABLE: Final = Path("/proc/net/tcp")
"""Linux's table of the machine's connections over IPv4, with the user of each end."""


def can_tell() -> bool:
    """Whether this system says who owns a connection; Linux does."""
    try:
        with _TABLE.open("rb") as table:
            return table.read(1) != b""
    except OSError:
        return False


def unguarded(what: str) -> list[str]:
    """A sentence for whoever runs ``what`` on a system that does not say who owns a connection.

    Of Linux, which does, none.
    """
    if can_tell():
        return []
    return [
        "this system does not say who owns a connection, so other users of this machine can "
        f"{what}; take part where you are the only user, or on Linux"
    ]


SERVER: Final = "reach the SuperLink, and so run programs here and write to clients as the server"
NODE: Final = "read what the server sends to this client, and answer for it"
"""What others can do where they are not kept out."""


def owner(peer: Address, server: Address, inode: int) -> int | None:
    """The user at the end ``peer`` of a connection to ``server``; None if there is nobody.

    ``inode`` is that of the server's own socket. Only while the table has it with these two
    addresses do they stand for this connection: one that was broken off may have been followed by
    another user's with the same. An end that its process has closed belongs to nobody: Linux shows
    it as root's.
    """
    ends = [_in_table(peer), _in_table(server)]
    is_here, user = False, None
    with _TABLE.open(encoding="ascii") as table:
        for line in table:
            fields = line.split()
            if fields[1:3] == ends and fields[9] != "0":
                user = int(fields[7])
            elif fields[2:0:-1] == ends and fields[9] == str(inode):
                is_here = True
    return user if is_here else None


def inode_of(receive: Receive) -> int | None:
    """The inode of the socket that a request came by, from uvicorn's ``receive``; or None."""
    transport = getattr(getattr(receive, "__self__", None), "transport", None)
    listening = None if transport is None else transport.get_extra_info("socket")
    try:
        return None if listening is None else os.fstat(listening.fileno()).st_ino
    except OSError:  # it is closed
        return None


def _in_table(address: Address) -> str:
    """An address as the table has it: in hexadecimal, the bytes in the machine's order."""
    number = int.from_bytes(socket.inet_aton(address[0]), sys.byteorder)
    return f"{number:08X}:{address[1]:04X}"


@dataclass(frozen=True)
class OwnUserOnly:
    """An ASGI application that passes on the requests of this process's user alone.

    With ``open_to_nodes`` the requests of nodes pass whoever sends them. ``most_body_bytes`` are
    those of a request of a node; others have at most ten times as many.
    """

    app: App
    open_to_nodes: bool
    most_body_bytes: int
    find_owner: Callable[[Address, Address, int], int | None] | None = owner

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or start and end with the server."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] != "http":
            raise ValueError(f"The SuperLink has no {scope['type']}.")
        elif not self._may_pass(scope, receive):
            await _answer(send, 403, "Only the user who runs this server may use this address.")
        elif scope["path"] == GUARDED:
            await _answer(send, 200, "guarded")
        elif _declared_bytes(scope) > self._most_bytes(scope):
            await _answer(send, 413, f"The body has more than {self._most_bytes(scope)} bytes.")
        else:
            await self.app(scope, _bounded(receive, self._most_bytes(scope)), send)

    def _may_pass(self, scope: Scope, receive: Receive) -> bool:
        if self.find_owner is None or (self.open_to_nodes and scope["path"].startswith(NODES)):
            return True
        peer, server, inode = scope.get("client"), scope.get("server"), inode_of(receive)
        if peer is None or server is None or inode is None:
            return False
        return self.find_owner(tuple(peer), tuple(server), inode) == os.getuid()

    def _most_bytes(self, scope: Scope) -> int:
        return self.most_body_bytes * (1 if scope["path"].startswith(NODES) else 10)


def _declared_bytes(scope: Scope) -> int:
    lengths = [value for name, value in scope["headers"] if name == b"content-length"]
    return int(lengths[0]) if len(lengths) == 1 and lengths[0].isdigit() else 0


def _bounded(receive: Receive, most_bytes: int) -> Receive:
    """The same, but a body that is longer ends as if its sender had left."""
    received_bytes = 0

    async def bounded() -> MutableMapping[str, Any]:
        nonlocal received_bytes
        event = await receive()
        received_bytes += len(event.get("body", b""))
        return {"type": "http.disconnect"} if received_bytes > most_bytes else event

    return bounded


async def _answer(send: Send, status: int, detail: str) -> None:
    """Answer in the form of Flower's own errors, and close: a body may still be on its way."""
    content = json.dumps({"code": status, "detail": detail}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(content))]
    headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content})
