"""Safetensors files read one tensor at a time, after a check of the whole header.

The reader seeks and reads instead of mapping the file: the pages of a map count as memory of
the process, so that a large file read through once would look like a leak.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flexlora.errors import AdapterError
from flexlora.storage.untrusted import parse_json, short

FLOAT_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}
"""The dtypes of adapter weights, by their names in a safetensors header."""

DTYPES = {**FLOAT_DTYPES, "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8}
"""All dtypes that are read, by their names in a safetensors header."""

LARGEST_HEADER = 100_000_000
"""In bytes; the limit of the safetensors library."""

Stamp = tuple[int, int, int]
"""The inode, size in bytes and modification time of a file, which change when it is replaced."""


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies: ``start`` is its offset in the file; sizes are in bytes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    bytes: int


@dataclass(frozen=True)
class TensorFile:
    """A safetensors file with a checked header; no tensor stays in memory.

    ``metadata`` is the header's table of texts. If ``stamp`` is not None, a file that was
    replaced since is refused. The value can be pickled and used in another process.
    """

    path: Path
    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, str]
    stamp: Stamp | None = None

    def read(self, *names: str) -> list[Tensor]:
        """Read the named tensors in this order; the file is opened once.

        Raises:
            KeyError: the file has no tensor of this name.
            OSError: the file cannot be opened or read any more.
            AdapterError: the file ends within a tensor, or was replaced.
        """
        places = [self.tensors[name] for name in names]
        with self.path.open("rb") as file:
            if self.stamp is not None and _stamp(os.fstat(file.fileno())) != self.stamp:
                raise AdapterError(f"{self.path} has changed since it was opened; read it again.")
            return [_read(file, place, self.path) for place in places]


def open_tensors(
    path: Path,
    dtypes: Mapping[str, torch.dtype] = DTYPES,
    largest_header: int = LARGEST_HEADER,
    refuse_changes: bool = False,
) -> TensorFile:
    """Check the header of a safetensors file; the tensors are read later, by name.

    The length of the header is compared with ``largest_header`` (bytes) and the file before it
    is read, and the safetensors library checks it before it is parsed here. Every tensor must
    have one of ``dtypes``, as many bytes as its shape takes, and a place of its own within the
    file. With ``refuse_changes``, later reads refuse a file that was replaced. Costs one pass
    over the header.

    Raises:
        AdapterError: the file cannot be read, or its header fails a check.
    """
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            length = int.from_bytes(file.read(8), "little")
            _check_length(length, status.st_size, largest_header)
            header = file.read(length)
        with safe_open(path, framework="pt"):
            entries = parse_json(header)
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise AdapterError(
            f"{path} is not a valid safetensors file: {short(error)}; copy it again, or save it "
            f"again with the program that wrote it."
        ) from error
    # Another program may have replaced the file between the two readings, so that the
    # library's checks are of other bytes; the ones below are of the bytes that count.
    metadata = _metadata(entries, path)
    data = range(8 + length, status.st_size)
    tensors = {name: _place(name, entry, data, dtypes, path) for name, entry in entries.items()}
    _refuse_overlaps(tensors.values(), path)
    return TensorFile(path, tensors, metadata, _stamp(status) if refuse_changes else None)


def _check_length(length: int, size: int, largest: int) -> None:
    if size < 8 or length > size - 8:
        raise AdapterError(f"it was cut off at {size} bytes, within its header")
    if length > largest:
        raise AdapterError(f"its header has {length} bytes, and {largest} are allowed")


def _metadata(entries: Any, path: Path) -> dict[str, str]:
    """Take the table of texts out of a header."""
    texts = (entries.pop("__metadata__", None) or {}) if isinstance(entries, dict) else None
    if not isinstance(texts, dict) or not all(isinstance(text, str) for text in texts.values()):
        raise AdapterError(f"{path}: the header is not a table of tensors; copy the file again.")
    return texts


def _place(
    name: str, entry: Any, data: range, dtypes: Mapping[str, torch.dtype], path: Path
) -> StoredTensor:
    """Where a tensor lies, after a check of its entry in the header."""
    # The safetensors library also accepts a list in place of the object.
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(first), int(last)]}:
            pass
        case _:
            raise AdapterError(
                f"{path}: the header's entry for {short(name)} does not give dtype, shape and "
                f"data_offsets; save the file again with the program that wrote it."
            )
    if dtype not in dtypes:
        raise AdapterError(
            f"{path}: {short(name)} has the dtype {short(dtype)}, which is not one of "
            f"{', '.join(dtypes)}; save it in one of these."
        )
    if not all(type(size) is int and size >= 0 for size in shape):
        raise AdapterError(
            f"{path}: {short(name)} has the shape {short(shape)}; save the file again with the "
            f"program that wrote it."
        )
    length = math.prod(shape) * dtypes[dtype].itemsize
    if not (first >= 0 and last - first == length and last <= len(data)):
        raise AdapterError(
            f"{path}: {short(name)} does not lie within the file; copy the file again."
        )
    return StoredTensor(name, dtypes[dtype], tuple(shape), data.start + first, length)


def _refuse_overlaps(tensors: Iterable[StoredTensor], path: Path) -> None:
    end = 0
    for tensor in sorted(tensors, key=lambda tensor: (tensor.start, tensor.bytes)):
        if tensor.start < end:
            raise AdapterError(
                f"{path}: {short(tensor.name)} overlaps another tensor; copy the file again."
            )
        end = tensor.start + tensor.bytes


def _read(file: BufferedReader, place: StoredTensor, path: Path) -> Tensor:
    data = bytearray(place.bytes)
    file.seek(place.start)
    if file.readinto(data) != place.bytes:
        raise AdapterError(f"{path} ends within {short(place.name)}; copy the file again.")
    if not data:
        return torch.empty(place.shape, dtype=place.dtype)
    return torch.frombuffer(data, dtype=place.dtype).view(place.shape)


def _stamp(status: os.stat_result) -> Stamp:
    return status.st_ino, status.st_size, status.st_mtime_ns
