"""Lines of JSON that tell whether they are as they were written.

The last key of a line, ``check``, is the beginning of the SHA-256 of what stands before it. Lines
without one, of earlier versions or of other programs, are read as they are.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any, Final

_DIGITS: Final = 16
_CHECK: Final = re.compile(rb', "check": "([0-9a-f]{%d})"\}\n' % _DIGITS)


def checked_line(values: Mapping[str, Any]) -> bytes:
    """A JSON object with its check as one line.

    Raises:
        ValueError: a value is NaN or infinite, which JSON cannot represent.
    """
    text = json.dumps(values, allow_nan=False).encode()[:-1]
    return b'%s, "check": "%s"}\n' % (text, _check(text))


def opened_line(line: bytes) -> dict[str, Any]:
    """The object in a line, without its check.

    Raises:
        ValueError: it is no JSON object, or not as it was written.
    """
    found = _found(line)
    if found is not None:
        text = line[: found.start()]
        if _check(text) != found[1]:
            raise ValueError("it does not agree with its checksum")
        line = text + b"}"
    values = json.loads(line)
    if not isinstance(values, dict):
        raise ValueError("it is not a JSON object")
    return values


def is_checked(line: bytes) -> bool:
    """Whether a line has a check, right or wrong."""
    return _found(line) is not None


def _found(line: bytes) -> re.Match[bytes] | None:
    return _CHECK.search(line, max(0, len(line) - _DIGITS - 20))


def _check(text: bytes) -> bytes:
    return hashlib.sha256(text).hexdigest()[:_DIGITS].encode()
