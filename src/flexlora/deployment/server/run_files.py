"""Files in the folder of a served run that several processes read and write.

Imports nothing slow: the gate is started again whenever it ends.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from flexlora.storage import DamagedFile, append, read_sealed, write_atomically, write_sealed
from flexlora.storage.untrusted import one_line

ARRIVALS: Final = "arrivals.log"
"""Sentences on clients that connected, were rejected or have the adapter; also from before the
first round, when the journal has not begun."""

NODES: Final = "nodes.json"
"""Flower's number of every authorised node, by the node's name."""

NUMBERS: Final = "node_keys.json"
"""Flower's number of every key that was ever registered, by the key's fingerprint."""

DELIVERED: Final = "delivered.json"
"""Which clients have the finished adapter; it exists once the run is finished. Not in the journal,
which ends with the last round."""

REPLY_BYTES: Final = "reply_bytes"
"""The largest payload of a client's answer in this run, in bytes; the SuperLink stores no more."""

CERTIFICATES: Final = "certificates.json"
"""What the gate says of the server's certificates; the run's process brings it into the journal."""

_LONGEST_LINE: Final = 500


def note(folder: Path, line: str) -> None:
    """Append a sentence for the server's console."""
    # Text of a client must not begin a line of its own.
    append(folder / ARRIVALS, f"{one_line(line, _LONGEST_LINE)}\n".encode())


def numbers(folder: Path, name: str) -> dict[str, int]:
    """Flower's numbers in a file of the run's folder, such as ``NODES``; none without a file.

    Raises:
        DamagedFile: it is not as it was written.
    """
    try:
        content = read_sealed(
            folder / name, "restore it from a copy, or start the run again in another folder"
        )
    except FileNotFoundError:
        return {}
    found: dict[str, int] = content["numbers"]
    return found


def write_numbers(folder: Path, name: str, content: Mapping[str, int]) -> None:
    """Write such a file."""
    write_sealed(folder / name, {"numbers": dict(content)})


@dataclass(frozen=True)
class CertificateNote:
    """A sentence on a certificate of the server; ``renewed`` if it is good news."""

    sentence: str
    renewed: bool


def write_certificate_notes(folder: Path, notes: Mapping[str, CertificateNote]) -> None:
    """Write what there is to say of the server's certificates.

    Each note is under what it tells: its sentence has another number of days from day to day.
    """
    write_sealed(folder / CERTIFICATES, {what: asdict(each) for what, each in notes.items()})


def certificate_notes(folder: Path) -> dict[str, CertificateNote]:
    """What was written last; nothing without a file, or if it is damaged: the gate writes anew."""
    try:
        content = read_sealed(folder / CERTIFICATES)
    except (FileNotFoundError, DamagedFile):
        return {}
    return {what: CertificateNote(**each) for what, each in content.items()}


def allow_replies(folder: Path, most_bytes: int) -> None:
    """Let clients answer with payloads of this many bytes, if they may not yet."""
    file = folder / REPLY_BYTES
    if not file.exists() or int(file.read_text(encoding="ascii")) < most_bytes:
        write_atomically(file, str(most_bytes).encode())
