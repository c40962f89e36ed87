"""Safetensors files read one tensor at a time, after a check of the whole header.

The header is parsed here and not by the safetensors library, which takes more than it should:
shapes such as [2^63, 0], any number of tensors. What is accepted here it accepts too.

The reader seeks and reads instead of mapping the file: the pages of a map count as memory of
the process, so that a large file read through once would look like a leak.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from flexlora.errors import AdapterError
from flexlora.storage.untrusted import RefusalCode, RefusedBytes, parse_json, short

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

LARGEST_SIDE = 2**31
"""The sides of a tensor are shorter."""

MOST_DIMENSIONS = 8
"""No tensor of a model or an adapter has more."""

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
            return [read_tensor(file, place, self.path) for place in places]


def open_tensors(
    path: Path,
    dtypes: Mapping[str, torch.dtype] = DTYPES,
    largest_header: int = LARGEST_HEADER,
    refuse_changes: bool = False,
) -> TensorFile:
    """Check the header of a safetensors file; the tensors are read later, by name.

    See ``read_header`` for the checks. With ``refuse_changes``, later reads refuse a file that
    was replaced. Costs one pass over the header.

    Raises:
        AdapterError: the file cannot be read, or its header fails a check: then ``RefusedBytes``.
    """
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            tensors, metadata = read_header(file, status.st_size, path, dtypes, largest_header)
    except OSError as error:
        raise AdapterError(
            f"{path} is not a valid safetensors file: {short(error)}; copy it again, or save it "
            f"again with the program that wrote it."
        ) from error
    return TensorFile(path, tensors, metadata, _stamp(status) if refuse_changes else None)


def read_header(
    file: BinaryIO,
    size: int,
    place: Path | str,
    dtypes: Mapping[str, torch.dtype] = DTYPES,
    largest_header: int = LARGEST_HEADER,
) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file of ``size`` bytes, from its header alone.

    The length of the header is compared with ``largest_header`` (bytes) and ``size`` before it is
    read. Every tensor must have one of ``dtypes``, as many bytes as its shape takes, and a place of
    its own; together they are the rest of the file, without a gap. Reads nothing but the header,
    and costs at most some 30 times its bytes of memory. ``place`` names the file in errors.

    Raises:
        RefusedBytes: a check fails.
        OSError: the file cannot be read.
    """
    length = int.from_bytes(file.read(8), "little")
    try:
        _check_length(length, size, largest_header)
        header = file.read(length)
        if len(header) != length or not header.startswith(b"{"):
            raise RefusedBytes(RefusalCode.NOT_JSON, "its header does not begin with {")
        entries = parse_json(header)
    except (ValueError, RecursionError) as error:
        code = error.code if isinstance(error, RefusedBytes) else RefusalCode.NOT_JSON
        raise RefusedBytes(
            code,
            f"{place} is not a valid safetensors file: {short(error)}; copy it again, or save it "
            f"again with the program that wrote it.",
        ) from error
    metadata = _metadata(entries, place)
    data = range(8 + length, size)
    tensors = {name: _tensor(name, entry, data, dtypes, place) for name, entry in entries.items()}
    _refuse_gaps(tensors.values(), data, place)
    return tensors, metadata


def read_tensor(file: BinaryIO, tensor: StoredTensor, place: Path | str) -> Tensor:
    """One tensor of a file whose header was checked; a copy.

    Raises:
        AdapterError: the file ends within it.
        OSError: the file cannot be read.
    """
    data = torch.empty(tensor.bytes, dtype=torch.uint8)
    file.seek(tensor.start)
    if file.readinto(data.numpy()) != tensor.bytes:  # type: ignore[attr-defined]
        raise AdapterError(f"{place} ends within {short(tensor.name)}; copy the file again.")
    return data.view(tensor.dtype).view(tensor.shape)


def _check_length(length: int, size: int, largest: int) -> None:
    if size < 8 or length > size - 8:
        raise RefusedBytes(
            RefusalCode.CUT_OFF, f"it was cut off at {size} bytes, within its header"
        )
    if length > largest:
        raise RefusedBytes(
            RefusalCode.HEADER_TOO_LONG, f"its header has {length} bytes, and {largest} are allowed"
        )


def _metadata(entries: Any, place: Path | str) -> dict[str, str]:
    """Take the table of texts out of a header."""
    texts = (entries.pop("__metadata__", None) or {}) if isinstance(entries, dict) else None
    if not isinstance(texts, dict) or not all(isinstance(text, str) for text in texts.values()):
        raise RefusedBytes(
            RefusalCode.WRONG_TYPE,
            f"{place}: the header is not a table of tensors; copy the file again.",
        )
    return texts


def _tensor(
    name: str, entry: Any, data: range, dtypes: Mapping[str, torch.dtype], place: Path | str
) -> StoredTensor:
    """Where a tensor lies, after a check of its entry in the header."""
    again = "save the file again with the program that wrote it"
    # The safetensors library also accepts a list in place of the object.
    match entry:
        case {
            "dtype": str(dtype),
            "shape": [*shape],
            "data_offsets": [int(first), int(last)],
        } if len(entry) == 3:
            pass
        case _:
            raise RefusedBytes(
                RefusalCode.WRONG_TYPE,
                f"{place}: the header's entry for {short(name)} is not dtype, shape and "
                f"data_offsets alone; {again}.",
            )
    if dtype not in dtypes:
        raise RefusedBytes(
            RefusalCode.WRONG_DTYPE,
            f"{place}: {short(name)} has the dtype {short(dtype)}, which is not one of "
            f"{', '.join(dtypes)}; save it in one of these.",
        )
    sides = all(type(size) is int and 0 <= size < LARGEST_SIDE for size in shape)
    if not sides or len(shape) > MOST_DIMENSIONS:
        raise RefusedBytes(
            RefusalCode.WRONG_SHAPE,
            f"{place}: {short(name)} has the shape {short(shape)}; {again}.",
        )
    length = math.prod(shape) * dtypes[dtype].itemsize
    if isinstance(first, bool) or isinstance(last, bool) or first < 0 or last - first != length:
        raise RefusedBytes(
            RefusalCode.WRONG_OFFSETS,
            f"{place}: {short(name)} has not as many bytes as its shape takes; {again}.",
        )
    if last > len(data):
        raise RefusedBytes(
            RefusalCode.CUT_OFF,
            f"{place}: {short(name)} does not lie within the file; copy the file again.",
        )
    return StoredTensor(name, dtypes[dtype], tuple(shape), data.start + first, length)


def _refuse_gaps(tensors: Iterable[StoredTensor], data: range, place: Path | str) -> None:
    """Refuse tensors that overlap, or do not fill the ``data`` of a file."""
    end = data.start
    for tensor in sorted(tensors, key=lambda tensor: (tensor.start, tensor.bytes)):
        if tensor.start != end:
            fault = "overlaps another tensor" if tensor.start < end else "comes after a gap"
            raise RefusedBytes(
                RefusalCode.WRONG_OFFSETS,
                f"{place}: {short(tensor.name)} {fault}; copy the file again.",
            )
        end = tensor.start + tensor.bytes
    if end != data.stop:
        raise RefusedBytes(
            RefusalCode.WRONG_SIZE,
            f"{place} has {data.stop - end} bytes after its last tensor; copy the file again.",
        )


def _stamp(status: os.stat_result) -> Stamp:
    return status.st_ino, status.st_size, status.st_mtime_ns
