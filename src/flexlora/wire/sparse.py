"""A matrix of many zeros as bytes: its other numbers, then one bit for every entry.

A bit for each entry costs no more than a 32nd of float32 numbers and a fixed amount, so that
what a sender claims of a shape is bounded by what it sends: at most 64 times its bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flexlora.errors import ProtocolError

Form = tuple[tuple[int, int], torch.dtype]
"""The shape and dtype of a matrix that travels as bytes."""

FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}
"""What safetensors calls the dtypes of adapters' numbers."""

LARGEST = 2**31
"""No side of a matrix is longer."""

BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16}
"""Whole numbers of the same size in bytes, to look at a number's bits."""


def packed(matrix: Tensor) -> Tensor:
    """The bytes (uint8) of a matrix; ``unpacked`` gives it back to the bit.

    First the numbers that are not zero, in the order of their rows, then the mask, eight
    entries to a byte, the first in the highest bit.
    """
    flat = matrix.detach().contiguous().flatten()
    # By its bits: a zero with a sign is kept as it is, and so is NaN.
    held = flat.view(BITS[flat.element_size()]) != 0
    mask = torch.from_numpy(np.packbits(held.numpy()))
    return torch.cat([flat[held].view(torch.uint8), mask])


def mask_bytes(shape: Sequence[int]) -> int:
    """How many bytes the mask of a matrix takes."""
    return -(-shape[0] * shape[1] // 8)


def unpacked(data: Tensor, shape: tuple[int, int], dtype: torch.dtype, name: str) -> Tensor:
    """The matrix that ``packed`` made these bytes of; all is checked before it is used.

    Raises:
        ProtocolError: the bytes are not those of a matrix of this shape and dtype.
    """
    entries, size = shape[0] * shape[1], dtype.itemsize
    numbers = data.numel() - mask_bytes(shape)
    if numbers < 0 or numbers % size:
        raise ProtocolError(
            f"Tensor {name[:80]!r} has {data.numel()} bytes, which are no sparse matrix of shape "
            f"{shape} in {dtype}."
        )
    bits = np.unpackbits(data[numbers:].numpy())
    held = torch.from_numpy(bits[:entries].astype(np.bool_))
    counted = int(held.sum())
    if counted * size != numbers or bits[entries:].any():
        raise ProtocolError(
            f"Tensor {name[:80]!r} marks {counted} of {entries} entries but holds "
            f"{numbers // size} numbers."
        )
    flat = torch.zeros(entries, dtype=dtype)
    # Cloned, as numbers must lie at multiples of their size.
    flat[held] = data[:numbers].clone().view(dtype)
    return flat.view(shape)


def thinned(
    tensors: Mapping[str, Tensor], dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, those as bytes that are smaller so, and what a header has to say of these."""
    found, shapes = dict(tensors), {}
    for name, matrix in tensors.items():
        bare, said = packed(matrix), json.dumps({name: list(matrix.shape)})
        if bare.numel() + len(said) < matrix.nbytes:
            found[name], shapes[name] = bare, list(matrix.shape)
    if not shapes:
        return found, {}
    called = next(known for known, each in FLOATS.items() if each == dtype)
    return found, {"sparse": {"dtype": called, "shapes": shapes}}


def forms(
    header: Mapping[str, Any], tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]]
) -> dict[str, Form]:
    """Which tensors travel as bytes, checked against what is known of them unread.

    ``header`` is from anybody; ``tensors`` are the dtypes and shapes of those that are there.

    Raises:
        ProtocolError: header and tensors do not fit, or a shape is none.
    """
    said = header.get("sparse", {"dtype": "F32", "shapes": {}})
    if not isinstance(said, dict) or not isinstance(said.get("shapes"), dict):
        raise ProtocolError("The header does not say which tensors are sparse, and of what shape.")
    if said.get("dtype") not in list(FLOATS):
        raise ProtocolError(
            f"Sparse numbers are of dtype {str(said.get('dtype'))[:40]!r}, not of {list(FLOATS)}."
        )
    bare = {name for name, (dtype, _) in tensors.items() if dtype == torch.uint8}
    if odd := sorted(bare ^ said["shapes"].keys()):
        raise ProtocolError(
            f"Tensor {odd[0][:80]!r} is not both of bytes and in the header's list of sparse ones."
        )
    dtype = FLOATS[said["dtype"]]
    return {
        name: (_shape(name, tensors[name][1], shape), dtype)
        for name, shape in said["shapes"].items()
    }


def _shape(name: str, held: Sequence[int], shape: object) -> tuple[int, int]:
    """The shape that a header says, if so many bytes may be such a matrix."""
    sides = shape if isinstance(shape, list) else []
    if len(sides) != 2 or any(type(n) is not int or not 0 <= n < LARGEST for n in sides):
        raise ProtocolError(f"Sparse tensor {name[:80]!r} is said to be {str(shape)[:40]}.")
    if len(held) != 1 or held[0] < mask_bytes(sides):
        raise ProtocolError(
            f"Sparse tensor {name[:80]!r} of shape {sides} holds {list(held)} bytes, but its mask "
            f"takes {mask_bytes(sides)}."
        )
    return sides[0], sides[1]
