"""Downloads and uploads as bytes, and the checks that an upload must pass.

Messages of others are looked at in this order: ``read_header`` checks all that the header says,
sizes in memory included, before a tensor is read; ``ExpectedUpload`` compares it with the one
upload that a client has to send; ``validate`` reads the values.
"""

from flexlora.wire.adapters import decode, encode, open_file, stored_at
from flexlora.wire.expected import ExpectedUpload, FactLimit, most_upload_bytes
from flexlora.wire.header import HeaderLimits, MessageHeader, ModuleShape, read_header
from flexlora.wire.messages import (
    decode_download,
    encode_download,
    encode_private,
    encode_upload,
    open_download,
    open_private,
    open_upload,
)
from flexlora.wire.refused import RefusedMessage

__all__ = [
    "ExpectedUpload",
    "FactLimit",
    "HeaderLimits",
    "MessageHeader",
    "ModuleShape",
    "RefusedMessage",
    "decode",
    "decode_download",
    "encode",
    "encode_download",
    "encode_private",
    "encode_upload",
    "most_upload_bytes",
    "open_download",
    "open_file",
    "open_private",
    "open_upload",
    "read_header",
    "stored_at",
]
