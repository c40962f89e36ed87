"""The content of Flower's messages: a header in JSON, and all tensors in one array.

Flower makes several requests for each array: 256 small ones take six times as long as one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from flexlora.errors import ProtocolError
from flexlora.storage.untrusted import short

NAME: Final = "flexlora"
HEADER: Final = f"{NAME}.header"
PAYLOAD: Final = f"{NAME}.payload"
DTYPE: Final = "uint8"
STYPE: Final = "flexlora.safetensors"
"""The array's type for Flower, which is not one of Flower's own."""

MOST_REQUEST_CHARACTERS: Final = 2**20
MOST_ANSWER_CHARACTERS: Final = 2**16
"""Of a header in JSON. A request has the run's specification, an answer some numbers, or an error
of a client."""

_REQUEST_KEYS: Final = frozenset(
    ("kind", "terms", "client", "round", "unused", "rows", "personal", "digest", "rounds")
)
_ANSWER_KEYS: Final = frozenset(
    (
        *("error", "forgot", "client", "round", "rounds", "digest", "base", "adapter", "kept"),
        *("attention", "feed_forward", "tokens_per_second", "device"),
        *("examples", "holdout", "loss_total", "loss_tokens"),
    )
)
KEYS: Final = _REQUEST_KEYS | _ANSWER_KEYS
"""All that a header may have."""


def payload(data: bytes) -> ArrayRecord:
    """Bytes as one array; messages that share it upload it once."""
    return ArrayRecord({NAME: Array(DTYPE, (len(data),), STYPE, data)})


def record(header: Mapping[str, Any], array: ArrayRecord | None = None) -> RecordDict:
    """A message's content."""
    content = RecordDict({HEADER: ConfigRecord({"json": json.dumps(header)})})
    if array is not None:
        content[PAYLOAD] = array
    return content


def opened(
    content: RecordDict, most_characters: int = MOST_REQUEST_CHARACTERS
) -> tuple[dict[str, Any], bytes]:
    """The header and the payload of a message's content.

    Nothing of a header is parsed before its length is compared with ``most_characters``.

    Raises:
        ProtocolError: it does not have the form that ``record`` makes.
    """
    if not content.keys() <= {HEADER, PAYLOAD}:
        raise ProtocolError(
            f"The message is not one of flexlora's: it has the records {short(sorted(content))}."
        )
    header = _header(content.get(HEADER), most_characters)
    if PAYLOAD not in content:
        return header, b""
    array = content[PAYLOAD]
    if not isinstance(array, ArrayRecord) or list(array) != [NAME] or array[NAME].stype != STYPE:
        raise ProtocolError("The message's payload is not one of flexlora's.")
    data = array[NAME].data
    if array[NAME].dtype != DTYPE or array[NAME].shape != (len(data),):
        raise ProtocolError(
            f"The message's payload has {len(data)} bytes, and says that it is of the type "
            f"{short(array[NAME].dtype)} and the shape {short(array[NAME].shape)}."
        )
    return header, data


def _header(record: object, most_characters: int) -> dict[str, Any]:
    text = record.get("json") if isinstance(record, ConfigRecord) and len(record) == 1 else None
    if not isinstance(text, str):
        raise ProtocolError("The message is not one of flexlora's.")
    if len(text) > most_characters:
        raise ProtocolError(
            f"The message's header has {len(text)} characters; the limit is {most_characters}."
        )
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ProtocolError("The message is not one of flexlora's.") from error
    if not isinstance(header, dict):
        raise ProtocolError("The message's header is not a JSON object.")
    if unknown := header.keys() - KEYS:
        raise ProtocolError(
            f"The message's header has the unknown field {short(min(unknown))}; install the same "
            "version of flexlora on both sides."
        )
    return header
