"""A process that keeps a node's model in memory, and others that ask it over a private socket.

Flower starts a new process for every message. It passes the message on to the worker, which
the owner has started beside it. Both ends send bytes: a header in JSON, then a payload. This
module imports nothing that takes time, as the asking side is started anew for every message.
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

Answer = tuple[dict[str, Any], bytes]
"""A header fit for JSON, and a payload."""

LONGEST_HEADER_BYTES: Final = 2**20
_LENGTHS: Final = struct.Struct("<QQ")
_SILENT_SECONDS: Final = 30.0
"""How long an asker may keep the worker waiting: it may hang, or be stopped, in the middle."""
_ARENA_MAX: Final = -8
"""The C library's number for how many heaps a process may have."""
_LONGEST_PATH: Final = 100
"""Of a socket's path, on every system."""


class Worker:
    """Answers requests at a socket that only its owner can reach, one at a time."""

    def __init__(self, path: Path, answer: Callable[[Mapping[str, Any], bytes], Answer]) -> None:
        """Listen at ``path``, in a folder of its owner's alone.

        Raises:
            ProtocolError: the path is too long for a socket, or others may enter its folder.
        """
        if (length := len(os.fsencode(path))) > _LONGEST_PATH:
            raise ProtocolError(
                f"The socket's path {path} has {length} bytes; systems take "
                f"{_LONGEST_PATH}. Give a shorter one."
            )
        if path.parent.stat().st_mode & 0o077:
            raise ProtocolError(
                f"The folder {path.parent} of the worker's socket is open to others; "
                f"run: chmod 700 {path.parent}"
            )
        _share_memory()
        self._answer = answer
        self._path = path
        path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        path.chmod(0o600)
        self._listener.listen()

    def serve(self) -> None:
        """Answer until the worker is closed."""
        while True:
            try:
                asker, _ = self._listener.accept()
            except OSError:  # closed
                return
            with asker:
                self._serve(asker)

    def _serve(self, asker: socket.socket) -> None:
        """One request. Who goes away before the answer, or falls silent, has lost it."""
        asker.settimeout(_SILENT_SECONDS)
        try:
            header, payload = _received(asker)
            _send(asker, *self._answer(header, payload))
        # Whatever an asker sends, the next one is answered: also a payload too large for memory.
        except Exception:
            return

    def close(self) -> None:
        """Stop listening."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._path.unlink(missing_ok=True)


def ask(path: Path, header: Mapping[str, Any], payload: bytes) -> Answer:
    """What the worker at ``path`` answers; waits as long as it takes.

    Raises:
        ProtocolError: no worker is there, or it went away before it answered.
    """
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asker:
            asker.connect(str(path))
            _send(asker, header, payload)
            return _received(asker)
    except (OSError, EOFError) as error:
        raise ProtocolError(
            f"The worker at {path} does not answer ({error or type(error).__name__}); is "
            "`flexlora join` still running?"
        ) from error


def _share_memory() -> None:
    """Let the thread that answers have its memory as the first thread has, where it is Linux.

    The C library would give it small heaps of its own and return them to the system again and
    again: turns of training took some 3 % longer.
    """
    if sys.platform == "linux":
        set_option = getattr(ctypes.CDLL(None), "mallopt", None)
        if set_option is not None:
            set_option(_ARENA_MAX, 1)


def _send(to: socket.socket, header: Mapping[str, Any], payload: bytes) -> None:
    said = json.dumps(header).encode()
    to.sendall(_LENGTHS.pack(len(said), len(payload)) + said)
    if payload:  # sending nothing fails, where the other has answered and gone already
        to.sendall(payload)


def _received(source: socket.socket) -> Answer:
    with source.makefile("rb") as reader:
        said, length = _LENGTHS.unpack(_exactly(reader, _LENGTHS.size))
        if said > LONGEST_HEADER_BYTES:
            raise ProtocolError(f"A header of {said} bytes is longer than {LONGEST_HEADER_BYTES}.")
        header = json.loads(_exactly(reader, said))
        if not isinstance(header, dict):
            raise ProtocolError("The header is no table.")
        return header, _exactly(reader, length)


def _exactly(reader: BinaryIO, count: int) -> bytes:
    """So many bytes, read into place, without a copy of them."""
    data = reader.read(count)
    if len(data) < count:
        raise EOFError("the connection was closed")
    return data
