"""Flower's two programs on a node: the SuperNode, and the process of one message.

Both run as modules of this library, so that they run only the installed app and take only what is
within the owner's limits.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import httpx
from flwr.app import Array
from flwr.supercore.inflatable.inflatable_object import get_object_body
from flwr.supernode import fleet_http_connection, main
from flwr.supernode.fleet_http_client import FleetHttpClient

from flexlora.deployment.flower import local_users
from flexlora.deployment.flower.installed_app import (
    InstalledApp,
    answer_with_it,
    one_of_flowers,
    run_it_alone,
    too_large,
)
from flexlora.deployment.flower.local_users import OwnUserOnly
from flexlora.deployment.flower.pull_backoff import shorten_pull_backoff
from flexlora.deployment.flower.supernode import MOST_BYTES
from flexlora.storage import untrusted

_MOST_RESPONSE_BYTES: Final = 32 * 2**20
"""Of one response to a request: Flower sends messages in parts of 5 MiB."""


def supernode() -> None:
    """Flower's SuperNode, which runs the installed app alone."""
    from flwr.supernode.cli import flower_supernode

    _log_printable_text()
    limit_responses()
    keep_others_out()
    home = Path(os.environ["FLWR_HOME"])
    run_it_alone(InstalledApp.built(), int(os.environ[MOST_BYTES]), home)
    flower_supernode()


def message() -> None:
    """Flower's program for one message, with the installed app and a shorter pause."""
    from flwr.supernode.cli import flwr_clientapp

    _log_printable_text()
    shorten_pull_backoff()
    answer_with_it()
    limit_arrays(int(os.environ[MOST_BYTES]))
    flwr_clientapp()


def _log_printable_text() -> None:
    logging.getLogger("flwr").addFilter(printable)


def printable(record: logging.LogRecord) -> bool:
    """Make a line of the log printable: no text of the server's may begin or hide one."""
    lines = record.getMessage().split("\n")[:20]
    # Flower's own sentences of several lines stay apart from the lines of the log.
    record.msg = "\n    ".join(untrusted.printable(line)[:2000] for line in lines)
    record.args = ()
    return True


def keep_others_out() -> None:
    """Let only this process's user reach the port by which Flower's processes pass messages on.

    Any other user of this machine could read a server's messages there, and answer them. It is so
    where the system says who owns a connection, as Linux does.
    """
    made = one_of_flowers(main, "create_app")
    find_owner = local_users.owner if local_users.can_tell() else None

    def create_app(*arguments: Any, **options: Any) -> OwnUserOnly:
        app = made(*arguments, **options)
        return OwnUserOnly(app, False, _MOST_RESPONSE_BYTES, find_owner)

    setattr(main, made.__name__, create_app)


def limit_responses() -> None:
    """Bound what is read of each response of the server, before it is in memory."""

    class Limited(FleetHttpClient):
        """Flower's connection to the server, whose responses have a largest size."""

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self._client.event_hooks["response"] = [limit_response]
            self._client.headers["accept-encoding"] = "identity"

    one_of_flowers(fleet_http_connection, FleetHttpClient.__name__)
    setattr(fleet_http_connection, FleetHttpClient.__name__, Limited)


def limit_response(response: httpx.Response) -> None:
    """Refuse a response that is too large, as soon as that is seen.

    Raises:
        httpx.DecodingError: it is compressed, so that its size is not that of what is sent.
        httpx.ReadError: it is too large; also later, when it is read.
    """
    if response.headers.get("content-encoding", "identity") != "identity":
        raise httpx.DecodingError("The response is compressed.", request=response.request)
    response.stream = _Limited(response.stream)


class _Limited(httpx.SyncByteStream):
    """A stream of bytes that ends with an error where it is longer than it may be."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def __iter__(self) -> Iterator[bytes]:
        read = 0
        for part in self.stream:
            read += len(part)
            if read > _MOST_RESPONSE_BYTES:
                raise httpx.ReadError(
                    f"The server's response has more than {_MOST_RESPONSE_BYTES} bytes."
                )
            yield part

    def close(self) -> None:
        self.stream.close()


def limit_arrays(most_bytes: int) -> None:
    """Bound what the arrays of a message take: Flower sends equal parts of an array once."""
    inflate = Array.inflate.__func__  # type: ignore[attr-defined]
    left = most_bytes

    def limited(cls: Any, object_content: bytes, children: dict[str, Any] | None = None) -> Any:
        nonlocal left
        parts = json.loads(get_object_body(object_content, cls))["arraychunk_ids"]
        largest = max((len(part.data) for part in (children or {}).values()), default=0)
        left -= max(len(parts) - 1, 0) * largest
        if left < 0:
            raise ValueError(too_large(most_bytes))
        return inflate(cls, object_content, children)

    Array.inflate = classmethod(limited)  # type: ignore[method-assign, assignment]


if __name__ == "__main__":
    {"supernode": supernode, "message": message}[sys.argv.pop(1)]()
