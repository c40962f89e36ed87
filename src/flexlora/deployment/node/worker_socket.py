"""A worker process with the node's model in memory, which serves requests at a private socket.

Flower starts a new process for every message. It passes the message on to the worker, which
`flexlora join` runs. Both sides send a header in JSON, then a payload of bytes. This module imports
nothing slow, as the requesting process is started for every message.
"""

from __future__ import annotations

import ctypes
import json
import os
import socket
import struct
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Final

from flexlora.errors import ProtocolError

Response = tuple[dict[str, Any], bytes]
"""A header of JSON values, and a payload."""

LONGEST_HEADER_BYTES: Final = 2**20
_LENGTHS: Final = struct.Struct("<QQ")
_SILENT_SECONDS: Final = 30.0
"""How long a requesting process may keep the worker waiting; it may hang or be stopped."""
_ARENA_MAX: Final = -8
"""The C library's number of the setting for the most heaps of a process."""
_LONGEST_PATH: Final = 100
"""Bytes of a socket's path that every system takes."""


class Worker:
    """Handles requests at a socket that only its user can reach, one at a time."""

    def __init__(
        self,
        path: Path,
        handle: Callable[[Mapping[str, Any], bytes], Response],
        most_bytes: int = 2**40,
    ) -> None:
        """Listen at ``path``, in a folder that only its user can enter.

        A request with a payload of more than ``most_bytes`` is refused before it is read.

        Raises:
            ProtocolError: the path is too long for a socket, or others may enter its folder.
        """
        if (length := len(os.fsencode(path))) > _LONGEST_PATH:
            raise ProtocolError(
                f"The socket's path {path} has {length} bytes; the limit is {_LONGEST_PATH}. Set "
                "TMPDIR to a folder with a shorter path."
            )
        if path.parent.stat().st_mode & 0o077:
            raise ProtocolError(
                f"The folder {path.parent} of the worker's socket is open to other users; "
                f"run: chmod 700 {path.parent}"
            )
        _share_memory()
        self._handle = handle
        self._most_bytes = most_bytes
        self._path = path
        path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        path.chmod(0o600)
        self._listener.listen()

    def serve(self) -> None:
        """Handle requests until the worker is closed."""
        while True:
            try:
                requester, _ = self._listener.accept()
            except OSError:  # closed
                return
            with requester:
                self._serve(requester)

    def _serve(self, requester: socket.socket) -> None:
        """Handle one request; a requester that leaves or stops sending gets no response."""
        requester.settimeout(_SILENT_SECONDS)
        try:
            header, payload = _received(requester, self._most_bytes)
            _send(requester, *self._handle(header, payload))
        # Whatever is sent, also a payload too large for memory, the next request is handled.
        except Exception:
            return

    def close(self) -> None:
        """Stop listening."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._path.unlink(missing_ok=True)


def request(path: Path, header: Mapping[str, Any], payload: bytes) -> Response:
    """The response of the worker at ``path``; waits for it without a limit.

    Raises:
        ProtocolError: there is no worker, or it ended before it responded.
    """
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            client.connect(str(path))
            _send(client, header, payload)
            return _received(client)
    except (OSError, EOFError) as error:
        raise ProtocolError(
            f"`flexlora join` has ended on this client's machine ({error or type(error).__name__} "
            f"at {path}); start it again."
        ) from error


def _share_memory() -> None:
    """Let the thread that handles requests allocate memory as the first thread does, on Linux.

    The C library would give it small heaps of its own and return them to the system again and
    again: local training took some 3 % longer.
    """
    if sys.platform == "linux":
        set_option = getattr(ctypes.CDLL(None), "mallopt", None)
        if set_option is not None:
            set_option(_ARENA_MAX, 1)


def _send(to: socket.socket, header: Mapping[str, Any], payload: bytes) -> None:
    text = json.dumps(header).encode()
    to.sendall(_LENGTHS.pack(len(text), len(payload)) + text)
    if payload:  # sending nothing fails if the other side has responded and closed already
        to.sendall(payload)


def _received(source: socket.socket, most_bytes: int = 2**40) -> Response:
    with source.makefile("rb") as reader:
        header_bytes, length = _LENGTHS.unpack(_exactly(reader, _LENGTHS.size))
        if header_bytes > LONGEST_HEADER_BYTES:
            raise ProtocolError(
                f"The header has {header_bytes} bytes; the limit is {LONGEST_HEADER_BYTES}."
            )
        if length > most_bytes:
            raise ProtocolError(f"The payload has {length} bytes; the limit is {most_bytes}.")
        header = json.loads(_exactly(reader, header_bytes))
        if not isinstance(header, dict):
            raise ProtocolError("The header is not a JSON object.")
        return header, _exactly(reader, length)


def _exactly(reader: BinaryIO, count: int) -> bytes:
    """This many bytes, read without a copy."""
    data = reader.read(count)
    if len(data) < count:
        raise EOFError("the connection was closed")
    return data
