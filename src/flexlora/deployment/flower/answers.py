"""Answers of nodes to messages, checked and made printable: the one place where they enter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from flwr.app import Message, RecordDict

from flexlora.deployment.flower import records
from flexlora.errors import ProtocolError
from flexlora.journal import LossKind
from flexlora.storage.untrusted import RefusalCode, one_line

AWAY: Final = (3, 4, 5)
"""Flower's codes for a message or a reply that is gone, and a node that is."""

LONGEST_REASON: Final = 500
LONGEST_TEXT: Final = 2000
"""Characters of an error that a client reports of itself, and of any other text in its answer."""


@dataclass(frozen=True)
class Answer:
    """What a client answered: values in a header, and bytes, which are not checked yet.

    Texts in the header are printable lines, cut to a length.
    """

    header: Mapping[str, Any]
    payload: bytes = b""

    @property
    def error(self) -> str | None:
        """The error that the client reports of itself, if it does."""
        return one_line(self.header["error"], LONGEST_TEXT) if "error" in self.header else None

    @property
    def has_forgotten(self) -> bool:
        """Whether that is the loss of the updates that it had merged."""
        return self.header.get("forgot") is True

    def facts(self) -> Mapping[str, Any]:
        """The header.

        Raises:
            ProtocolError: the client reports an error instead.
        """
        if (error := self.error) is not None:
            raise ProtocolError(error)
        return self.header


@dataclass(frozen=True)
class NoAnswer:
    """Why there is no answer, in words, and for programs: see ``Lost``.

    With ``is_away`` the node is gone, or the message is, and it is sent again.
    """

    reason: str
    kind: LossKind = LossKind.UNREACHABLE
    is_away: bool = False
    code: str = ""

    def facts(self) -> Mapping[str, Any]:
        """Raise the reason as a ProtocolError."""
        raise ProtocolError(self.reason)


def read(message: Message, most_bytes: int) -> Answer | NoAnswer:
    """A node's message as an answer with a payload of at most ``most_bytes``.

    Whatever its bytes raise is a reason, and not an error of the server.
    """
    try:
        if message.has_error():
            return _flower_error(message)
        return read_content(message.content, most_bytes)
    except Exception as error:
        return unreadable(error)


def read_content(content: RecordDict, most_bytes: int) -> Answer | NoAnswer:
    """See ``read``; of a message that is no error of Flower's."""
    try:
        header, payload = records.opened(content, records.MOST_ANSWER_CHARACTERS)
        if len(payload) > most_bytes:
            return too_large(len(payload), most_bytes)
        return Answer(_printable(header), payload)
    except ProtocolError as error:
        return malformed(one_line(error, LONGEST_REASON))
    except Exception as error:
        return unreadable(error)


def malformed(reason: str) -> NoAnswer:
    """An answer that is not in the form of one."""
    return NoAnswer(reason, LossKind.INVALID_UPLOAD, code=RefusalCode.WRONG_TYPE)


def unreadable(error: Exception) -> NoAnswer:
    """An answer whose bytes decide what is raised: KeyError, ValueError, TypeError, ..."""
    reason = f"Flower cannot read its answer ({type(error).__name__}: {error})."
    return malformed(one_line(reason, LONGEST_REASON))


def too_large(size_bytes: int, most_bytes: int) -> NoAnswer:
    """An answer that is refused for its size."""
    reason = f"Its answer has {size_bytes} bytes, and the request asks for {most_bytes} at most."
    return NoAnswer(reason, LossKind.INVALID_UPLOAD, code=RefusalCode.WRONG_SIZE)


def _flower_error(message: Message) -> NoAnswer:
    """An error of Flower's in words."""
    code, reason = message.error.code, message.error.reason or "no reason"
    text = one_line(f"Flower's error {code}: {reason}", LONGEST_REASON)
    return NoAnswer(text, is_away=code in AWAY)


def _printable(header: Mapping[str, Any]) -> dict[str, Any]:
    """The header with its texts as printable lines.

    Raises:
        ProtocolError: a value is a list or an object, which answers have none of; or the client's
            name would be another then.
    """
    values = {
        key: one_line(value, LONGEST_TEXT) if isinstance(value, str) else value
        for key, value in header.items()
    }
    for key, value in values.items():
        if isinstance(value, list | dict):
            raise ProtocolError(f"Its answer has a {type(value).__name__} as {key!r}.")
    if values.get("client") != header.get("client"):
        raise ProtocolError(f"Its name {values['client']!r:.60} cannot be printed as it is.")
    return values
