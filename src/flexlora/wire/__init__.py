"""Downloads and uploads as bytes, and the checks that an upload must pass."""

from flexlora.wire.adapters import decode, encode, open_file, stored_at
from flexlora.wire.messages import (
    decode_download,
    encode_download,
    encode_private,
    encode_upload,
    open_download,
    open_private,
    open_upload,
)

__all__ = [
    "decode",
    "decode_download",
    "encode",
    "encode_download",
    "encode_private",
    "encode_upload",
    "open_download",
    "open_file",
    "open_private",
    "open_upload",
    "stored_at",
]
