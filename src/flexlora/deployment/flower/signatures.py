"""Who signed a request: read from its headers, before a byte of its body is taken.

Flower's nodes sign the time of each request, and nothing else of it: a signature says who is
connected, and TLS alone protects what is sent. Every request, a repeated one too, has a time of
its own, so a time that comes twice from one key is a copy.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from flexlora.deployment.flower.gate_rules import Headers, Refused
from flexlora.deployment.greeting import KeyState
from flexlora.deployment.keys import fingerprint_of
from flexlora.deployment.server.run_files import NODES, NUMBERS, numbers
from flexlora.storage import DamagedFile

KEY_HEADER: Final = b"flwr-public-key"
TIME_HEADER: Final = b"flwr-timestamp"
SIGNATURE_HEADER: Final = b"flwr-signature"
_LONGEST: Final = {KEY_HEADER: 1024, TIME_HEADER: 40, SIGNATURE_HEADER: 256}

EARLIEST_SECONDS, LATEST_SECONDS = -5.0, 305.0
"""The ages of a signature that the SuperLink takes, exclusive."""

_MOST_TIMES: Final = 20_000
"""Times of one key that are remembered, some 2 MB: 65 requests a second on average."""

_MOST_PARSED: Final = 1024

_ACTIVATE: Final = b"/v1/fleet/activate-node"


@dataclass
class NumbersFile:
    """A file of numbers by name that other processes replace; parsed anew only after a change."""

    path: Path
    _version: tuple[int, int, int] | None = None
    _content: dict[str, int] = field(default_factory=dict)

    def read(self) -> Mapping[str, int]:
        """What is in it now; nothing if there is no file, and what was before if it is damaged."""
        try:
            status = self.path.stat()
        except OSError:
            return {}
        version = (status.st_mtime_ns, status.st_size, status.st_ino)
        if version != self._version:
            try:
                content = numbers(self.path.parent, self.path.name)
            except (OSError, DamagedFile):
                return self._content
            self._version, self._content = version, content
        return self._content


@dataclass
class RegisteredKeys:
    """The keys that may take part in the run in ``folder``, by their fingerprints."""

    folder: Path
    _numbers: NumbersFile = field(init=False)
    _nodes: NumbersFile = field(init=False)

    def __post_init__(self) -> None:
        self._numbers = NumbersFile(self.folder / NUMBERS)
        self._nodes = NumbersFile(self.folder / NODES)

    def state(self, fingerprint: str) -> KeyState:
        """What is known of a key."""
        number = self._numbers.read().get(fingerprint)
        if number is None:
            return KeyState.UNKNOWN
        is_authorised = number in self._nodes.read().values()
        return KeyState.REGISTERED if is_authorised else KeyState.REVOKED


@dataclass
class Signatures:
    """Checks that a request comes from a registered node; one or two milliseconds for each."""

    registered: RegisteredKeys
    _keys: dict[bytes, tuple[str, ec.EllipticCurvePublicKey]] = field(default_factory=dict)
    _times: dict[str, dict[str, datetime]] = field(default_factory=dict)

    def signer(self, path: bytes, headers: Headers) -> str:
        """The fingerprint of the registered key that signed the request.

        Raises:
            Refused: no such key did, or the signature was used before. A node ends after 401, as
                it does when the SuperLink itself refuses it; it tries again after 503.
        """
        sent = {name: _single(headers, name) for name in _LONGEST}
        signed_at = _time(sent[TIME_HEADER])
        fingerprint, key = self._key(sent[KEY_HEADER])
        if self.registered.state(fingerprint) is not KeyState.REGISTERED:
            # As the SuperLink answers, so that Flower's node says that it cannot be activated.
            status = 412 if path == _ACTIVATE else 401
            raise Refused(status, "Failed to activate: the server does not know this node's key.")
        try:
            signature = base64.b64decode(sent[SIGNATURE_HEADER], validate=True)
            key.verify(signature, sent[TIME_HEADER], ec.ECDSA(hashes.SHA256()))
        except (InvalidSignature, binascii.Error, ValueError) as error:
            raise Refused(401, "The request is not signed with the node's key.") from error
        if len(self._keys) >= _MOST_PARSED:
            self._keys.clear()
        # Only now: whoever has not signed costs no memory.
        self._keys[sent[KEY_HEADER]] = fingerprint, key
        self._take(fingerprint, sent[TIME_HEADER].decode("ascii"), signed_at)
        return fingerprint

    def _key(self, header: bytes) -> tuple[str, ec.EllipticCurvePublicKey]:
        if (parsed := self._keys.get(header)) is not None:
            return parsed
        try:
            key: Any = serialization.load_pem_public_key(base64.b64decode(header, validate=True))
        except (binascii.Error, ValueError, UnsupportedAlgorithm) as error:
            raise Refused(401, "The request has no readable public key.") from error
        if not isinstance(key, ec.EllipticCurvePublicKey):
            raise Refused(401, "The request's public key is not one of a Flower node.")
        try:
            fingerprint = fingerprint_of(key)
        except (ValueError, UnsupportedAlgorithm) as error:  # a curve that OpenSSH does not have
            raise Refused(401, "The request's public key is not one of a Flower node.") from error
        return fingerprint, key

    def _take(self, fingerprint: str, time: str, signed_at: datetime) -> None:
        """Remember a signed time as long as it is valid. Raises Refused if it was used before."""
        times, now = self._times.setdefault(fingerprint, {}), datetime.now(UTC)
        while times:
            oldest = next(iter(times))
            if (now - times[oldest]).total_seconds() < LATEST_SECONDS:
                break
            del times[oldest]
        if time in times:
            raise Refused(503, "This signature was used before; sign the request anew.")
        if len(times) >= _MOST_TIMES:
            raise Refused(503, "This node sends too many requests.")
        times[time] = signed_at


def _single(headers: Headers, name: bytes) -> bytes:
    values = [value for other, value in headers if other == name]
    if len(values) != 1 or not 0 < len(values[0]) <= _LONGEST[name]:
        raise Refused(401, f"The request has no single {name.decode()} of a Flower node.")
    return values[0]


def _time(header: bytes) -> datetime:
    try:
        signed_at = datetime.fromisoformat(header.decode("ascii"))
        age_seconds = (datetime.now(UTC) - signed_at).total_seconds()
    except (ValueError, TypeError, OverflowError) as error:
        raise Refused(401, "The request's time is not one of a Flower node.") from error
    if not EARLIEST_SECONDS < age_seconds < LATEST_SECONDS:
        raise Refused(
            401,
            f"The request was signed {abs(age_seconds):.0f} s "
            f"{'ago' if age_seconds > 0 else 'in the future'}: set the clocks of both machines.",
        )
    return signed_at
