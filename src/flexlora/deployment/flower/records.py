"""What travels in Flower's messages: a header in JSON, and all tensors in one array.

Each array costs Flower several requests, so that 256 small ones take six times as long as one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from flexlora.errors import ProtocolError

NAME: Final = "flexlora"
STYPE: Final = "flexlora.safetensors"
"""How Flower is told that the array is none of its own kind."""


def payload(data: bytes) -> ArrayRecord:
    """Bytes as one array; messages that share it upload it once."""
    return ArrayRecord({NAME: Array("uint8", (len(data),), STYPE, data)})


def record(header: Mapping[str, Any], held: ArrayRecord | None = None) -> RecordDict:
    """A message's content."""
    content = RecordDict({f"{NAME}.header": ConfigRecord({"json": json.dumps(header)})})
    if held is not None:
        content[f"{NAME}.payload"] = held
    return content


def opened(content: RecordDict) -> tuple[dict[str, Any], bytes]:
    """The header and the payload of a message's content.

    Raises:
        ProtocolError: it is none that ``record`` makes.
    """
    try:
        header = json.loads(str(content[f"{NAME}.header"]["json"]))
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ProtocolError("The message is none of flexlora's.") from error
    if not isinstance(header, dict):
        raise ProtocolError("The message's header is no table.")
    if f"{NAME}.payload" not in content:
        return header, b""
    held = content[f"{NAME}.payload"]
    if not isinstance(held, ArrayRecord) or list(held) != [NAME] or held[NAME].stype != STYPE:
        raise ProtocolError("The message's payload is none of flexlora's.")
    return header, held[NAME].data
