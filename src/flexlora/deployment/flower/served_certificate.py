"""The certificate that the gate shows: taken anew when its file changes, watched for its end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from flexlora.deployment.certificates import ServerKeys
from flexlora.deployment.key_files import check_private
from flexlora.deployment.server.run_files import (
    CERTIFICATES,
    CertificateNote,
    note,
    write_certificate_notes,
)
from flexlora.errors import ProtocolError

_LOOK_SECONDS: Final = 2.0
_NOTICE_SECONDS: Final = 86400.0
_CIPHERS: Final = "ECDHE+AESGCM:ECDHE+CHACHA20"

_log = logging.getLogger(__name__)

_Version = tuple[tuple[int, int, int], ...]


@dataclass
class ServedCertificate:
    """TLS settings with the server's files; ``run`` is the folder whose console and journal get
    notices.

    Raises:
        ProtocolError: the files do not go together, or cannot be read.
    """

    keys: ServerKeys
    run: Path | None = None
    now: Callable[[], float] = time.monotonic
    context: ssl.SSLContext = field(init=False)
    _version: _Version = field(init=False)
    _noticed: dict[str, float] = field(default_factory=dict, init=False)
    _journaled: dict[str, CertificateNote] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        if self.run is not None:
            (self.run / CERTIFICATES).unlink(missing_ok=True)
        self._version = self._files()
        self.context = _context(self.keys)

    async def watch(self) -> None:
        """Look every two seconds whether the files have changed, or expire soon; for ever."""
        while True:
            self.look()
            await asyncio.sleep(_LOOK_SECONDS)

    def look(self) -> None:
        """Take changed files, and note what expires within 30 days: once, then once a day."""
        with contextlib.suppress(OSError):  # a file is being replaced
            if (version := self._files()) != self._version:
                self._take(version)
        with contextlib.suppress(OSError, ProtocolError):
            for sentence in self.keys.notices(datetime.now(UTC)):
                self._notice(sentence.partition(", in ")[0], sentence)

    def _take(self, version: _Version) -> None:
        self._version = version
        try:
            self.context = _context(self.keys)
            ends = self.keys.expires
        except ProtocolError as error:
            self._note(f"{error} The gate keeps the certificate that it has.")
            return
        except OSError as error:
            self._note(
                f"{error.filename or self.keys.certificate} cannot be read ({error.strerror}); "
                "the gate keeps the certificate that it has."
            )
            return
        self._noticed.clear()
        self._journaled.clear()
        sentence = f"the gate shows {self.keys.certificate} anew, valid until {ends:%Y-%m-%d}"
        self._note(sentence, renewed=True)

    def _notice(self, what: str, sentence: str) -> None:
        now = self.now()
        if now - self._noticed.get(what, -_NOTICE_SECONDS) >= _NOTICE_SECONDS:
            self._noticed[what] = now
            self._note(sentence, what)

    def _note(self, sentence: str, what: str = "", renewed: bool = False) -> None:
        """Say a sentence on the console, and in the journal if that does not say as much yet."""
        _log.warning("%s", sentence)
        if self.run is None:
            return
        with contextlib.suppress(OSError):
            note(self.run, sentence)
        if (what or sentence) not in self._journaled:
            self._journaled[what or sentence] = CertificateNote(sentence, renewed)
            with contextlib.suppress(OSError):
                write_certificate_notes(self.run, self._journaled)

    def _files(self) -> _Version:
        found = [path.stat() for path in (self.keys.certificate, self.keys.key)]
        return tuple((each.st_mtime_ns, each.st_size, each.st_ino) for each in found)


def _context(keys: ServerKeys) -> ssl.SSLContext:
    check_private(keys.key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(_CIPHERS)
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    try:
        context.load_cert_chain(keys.certificate, keys.key)
    except ssl.SSLError as error:
        raise ProtocolError(
            f"{keys.certificate} and {keys.key} are not a certificate and its key."
        ) from error
    return context
