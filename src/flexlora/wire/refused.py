"""The exception for messages that fail a check, with a code for programs."""

from __future__ import annotations

from flexlora.errors import ProtocolError
from flexlora.storage.untrusted import RefusalCode


class RefusedMessage(ProtocolError):
    """A message that fails a check; ``code`` says which, and the journal repeats it."""

    def __init__(self, code: RefusalCode, reason: str) -> None:
        super().__init__(reason)
        self.code = code
