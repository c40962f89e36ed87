"""The one request that the gate answers itself: may the client with this key take part?"""

from __future__ import annotations

from enum import StrEnum
from typing import Final

HELLO: Final = "/v1/flexlora/hello"
KEY_HEADER: Final = "flexlora-key"
"""The SHA-256 fingerprint of the client's public key, as ``ssh-keygen -l`` prints it."""
NAME_HEADER: Final = "flexlora-name"
"""The name that the client gives itself, for the server's console."""


class KeyState(StrEnum):
    """What the server knows of a client's key."""

    REGISTERED = "registered"
    REVOKED = "revoked"
    UNKNOWN = "unknown"
