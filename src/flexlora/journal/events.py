"""What the events of a journal say that is more than a number: the kinds of losses."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any


class LossKind(StrEnum):
    """Why a round goes on without a client's upload; the field ``kind`` of a ``lost`` event.

    Status pages, metrics and reports read the kind; the reason beside it is for people only.
    """

    NO_ANSWER = "no_answer"
    """Its local training was not over, or nothing had come back, at the deadline."""

    NOT_BEGUN = "not_begun"
    """Its local training had not begun at the deadline."""

    NOT_NEEDED = "not_needed"
    """The round had enough uploads before this one came (over-selection); no failure."""

    INVALID_UPLOAD = "invalid_upload"
    """Its upload cannot be read, or is not the upload that the round asks for."""

    CLIENT_ERROR = "client_error"
    """The client reported an error of its own."""

    UNREACHABLE = "unreachable"
    """Its node is offline, or the transport could not carry the request or the answer."""

    LOST_STATE = "lost_state"
    """The client reported that its stored state is gone, so it cannot use the download."""

    WORKER_DIED = "worker_died"
    """The processes that trained it died, as often as the transport tries again."""

    OTHER = "other"
    """None of these, and every loss in a journal that was written without kinds."""


def loss_kind(event: Mapping[str, Any]) -> LossKind:
    """The kind of a ``lost`` event; ``OTHER`` if it has none, or one of a later version."""
    try:
        return LossKind(event.get("kind", LossKind.OTHER))
    except ValueError:
        return LossKind.OTHER
