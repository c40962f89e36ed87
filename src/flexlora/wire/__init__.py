"""Downloads and uploads as bytes, and the checks that an upload must pass."""

from flexlora.wire.messages import (
    decode,
    decode_download,
    encode,
    encode_download,
    encode_private,
    encode_upload,
    open_download,
    open_file,
    open_private,
    open_upload,
    stored_at,
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
