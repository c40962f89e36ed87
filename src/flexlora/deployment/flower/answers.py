"""Answers of nodes to messages: pulled one by one, and their errors in words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

import httpx
from flwr.app import Message
from flwr.serverapp import Grid

from flexlora.deployment.flower import records
from flexlora.errors import ProtocolError

AWAY: Final = (3, 4, 5)
"""Flower's codes for a message or a reply that is gone, and a node that is."""

LONGEST_REASON: Final = 500

Answer = Message | ProtocolError
"""A message from a node, or the error with which Flower could not read it."""


def pulled(grid: Grid, ids: Sequence[str]) -> Iterator[tuple[str, Answer]]:
    """The answers to these messages that have arrived, by id, one in memory at a time.

    Flower makes objects of a node's bytes while it pulls; everything that is pulled together
    with a message that it cannot read is lost. So each message is pulled by itself.
    """
    for id in ids:
        try:
            for message in grid.pull_messages([id]):
                yield id, message
        except httpx.HTTPError:
            raise  # the SuperLink is away
        # A node's bytes decide what Flower raises: KeyError, ValueError, TypeError, ...
        except Exception as error:
            reason = f"Flower cannot read its answer ({type(error).__name__}: {error})."
            yield id, ProtocolError(reason[:LONGEST_REASON])


def is_away(message: Message) -> bool:
    """Whether a message or its reply is gone, or its node is."""
    return message.has_error() and message.error.code in AWAY


def flower_error(message: Message) -> str:
    """An error of Flower's in words."""
    reason = message.error.reason or "no reason"
    return f"Flower's error {message.error.code}: {reason}"[:LONGEST_REASON]


def header_of(answer: Answer) -> dict[str, Any]:
    """What a node answers beside a payload.

    Raises:
        ProtocolError: it sent an error, or what Flower or this library cannot read.
    """
    if isinstance(answer, ProtocolError):
        raise answer
    if answer.has_error():
        raise ProtocolError(flower_error(answer))
    header, _ = records.opened(answer.content)
    if "error" in header:
        raise ProtocolError(str(header["error"])[:2000])
    return header


def has_client_error(answer: Answer) -> bool:
    """Whether a client reports an error of its own, other than lost state."""
    if isinstance(answer, ProtocolError) or answer.has_error():
        return False
    try:
        header, _ = records.opened(answer.content)
    except ProtocolError:
        return False
    return "error" in header and header.get("forgot") is not True
