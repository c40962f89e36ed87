"""The content of Flower's messages: a header in JSON, and all tensors in one array.

Flower makes several requests for each array: 256 small ones take six times as long as one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from flexlora.errors import ProtocolError

NAME: Final = "flexlora"
STYPE: Final = "flexlora.safetensors"
"""The array's type for Flower, which is not one of Flower's own."""


def payload(data: bytes) -> ArrayRecord:
    """Bytes as one array; messages that share it upload it once."""
    return ArrayRecord({NAME: Array("uint8", (len(data),), STYPE, data)})


def record(header: Mapping[str, Any], array: ArrayRecord | None = None) -> RecordDict:
    """A message's content."""
    content = RecordDict({f"{NAME}.header": ConfigRecord({"json": json.dumps(header)})})
    if array is not None:
        content[f"{NAME}.payload"] = array
    return content


def opened(content: RecordDict) -> tuple[dict[str, Any], bytes]:
    """The header and the payload of a message's content.

    Raises:
        ProtocolError: it does not have the form that ``record`` makes.
    """
    try:
        header = json.loads(str(content[f"{NAME}.header"]["json"]))
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ProtocolError("The message is not one of flexlora's.") from error
    if not isinstance(header, dict):
        raise ProtocolError("The message's header is not a JSON object.")
    if f"{NAME}.payload" not in content:
        return header, b""
    array = content[f"{NAME}.payload"]
    if not isinstance(array, ArrayRecord) or list(array) != [NAME] or array[NAME].stype != STYPE:
        raise ProtocolError("The message's payload is not one of flexlora's.")
    return header, array[NAME].data
