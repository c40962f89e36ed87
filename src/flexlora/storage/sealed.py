"""Files that tell whether they are as they were written: each has a SHA-256.

A JSON file has it in itself, as its first key; another file has it in a small file beside it.
It is against damage, by disks and by people; whoever can write both can forge both.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from flexlora.errors import ProtocolError
from flexlora.storage.files import replacing, sha256, write_atomically
from flexlora.storage.untrusted import parse_json, short

SUM: Final = ".sha256"
"""What follows the name of a file in the name of the file with its SHA-256."""

_HEAD: Final = re.compile(rb'\{\n "sha256": "([0-9a-f]{64})",')
_LINE: Final = re.compile(r"([0-9a-f]{64})  ([^\n/]+)\n")
_BLOCK_BYTES: Final = 2**20


class DamagedFile(ProtocolError):
    """A file is not as it was written, or is missing.

    ``reason`` follows the name of the file in a sentence; ``remedy`` ends it.
    """

    def __init__(self, path: Path, reason: str, remedy: str = "", sentence: str = "") -> None:
        super().__init__(sentence or f"{path} {reason}{f'; {remedy}' if remedy else ''}.")
        self.path, self.reason, self.remedy = path, reason, remedy

    def __reduce__(self) -> tuple[type[DamagedFile], tuple[Path, str, str, str]]:
        return type(self), (self.path, self.reason, self.remedy, str(self))


def write_sealed(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object with its SHA-256, and that of its name, as the first key.

    It must have keys of its own.

    Raises:
        ValueError: a number is NaN or infinite.
        OSError: the file cannot be written.
    """
    text = json.dumps(content, indent=1, allow_nan=False).encode()
    digest = _seal(path, text)
    write_atomically(path, b'{\n "sha256": "%s",' % digest.encode() + text[1:])


def read_sealed(
    path: Path, remedy: str = "restore it from a copy", or_plain: bool = False
) -> dict[str, Any]:
    """The JSON object that ``write_sealed`` has written.

    With ``or_plain`` one without a checksum is read too, as earlier versions wrote them.

    Raises:
        DamagedFile: the file has been changed in any way since, or has no checksum; with the
            ``remedy``.
        FileNotFoundError: there is no file.
    """
    data = path.read_bytes()
    head = _HEAD.match(data)
    if head is None and or_plain:
        return _plain(path, data, remedy)
    if head is None:
        reason = "has no checksum: it is damaged, or of an earlier version of flexlora"
        raise DamagedFile(path, reason, remedy)
    text = b"{" + data[head.end() :]
    if _seal(path, text).encode() != head[1]:
        raise DamagedFile(path, "does not agree with its checksum: it is damaged", remedy)
    content: dict[str, Any] = json.loads(text)
    return content


def _seal(path: Path, text: bytes) -> str:
    """The SHA-256 of the name and the content: a file is not taken for one of another name."""
    return hashlib.sha256(path.name.encode() + b"\n" + text).hexdigest()


def _plain(path: Path, data: bytes, remedy: str) -> dict[str, Any]:
    """The JSON object in a file without a checksum."""
    try:
        content = parse_json(data)
    except (ValueError, RecursionError) as error:
        raise DamagedFile(path, f"is not valid JSON ({short(error)})", remedy) from error
    if not isinstance(content, dict):
        raise DamagedFile(path, "is not a JSON object", remedy)
    return content


def write_summed(path: Path, data: bytes) -> str:
    """Write a file, and its SHA-256 beside it, which is returned.

    The sum is written first: a file without one was not written whole. Several processes may
    write the same file with the same content.
    """
    digest = hashlib.sha256(data).hexdigest()
    write_atomically(sum_file(path), f"{digest}  {path.name}\n".encode())
    write_atomically(path, data)
    return digest


def sum_file(path: Path) -> Path:
    """The file beside ``path`` with its SHA-256, in the form of the program sha256sum."""
    return path.with_name(f"{path.name}{SUM}")


def sum_of(path: Path) -> str | None:
    """The SHA-256 that a file had when it was written; None if that cannot be read."""
    try:
        line = _LINE.fullmatch(sum_file(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return line[1] if line and line[2] == path.name else None


def is_intact(path: Path) -> bool:
    """Whether a file is as ``write_summed`` has written it; reads the whole file."""
    digest = sum_of(path)
    return digest is not None and path.is_file() and sha256(path) == digest


def remove_summed(path: Path) -> None:
    """Remove a file and its sum, whichever of them are there; the sum last."""
    path.unlink(missing_ok=True)
    sum_file(path).unlink(missing_ok=True)


def copy_verified(source: Path, target: Path, digest: str) -> None:
    """Copy a file that must have this SHA-256, which is computed on the way.

    Raises:
        DamagedFile: it has another one; no target is written.
    """
    running = hashlib.sha256()
    with source.open("rb") as file, replacing(target) as out:
        while block := file.read(_BLOCK_BYTES):
            running.update(block)
            out.write(block)
        if running.hexdigest() != digest:
            raise DamagedFile(source, "does not agree with its checksum: it is damaged")


def link_or_copy(source: Path, target: Path, digest: str) -> None:
    """One file under two names, or a verified copy where the disk cannot have that."""
    try:
        os.link(source, target)
    except OSError:
        copy_verified(source, target, digest)
