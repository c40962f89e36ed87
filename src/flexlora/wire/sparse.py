"""A sparse matrix as bytes: its nonzero values, then a bit mask with one bit per entry.

The mask costs 1/32 of a dense float32 matrix, and it bounds what a sender can claim: the dense
matrix has at most 64 times as many bytes as were sent.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flexlora.errors import ProtocolError
from flexlora.storage.tensors import FLOAT_DTYPES

LARGEST_SIDE = 2**31
"""The sides of a matrix are shorter."""

BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16}
"""The integer dtype with the size in bytes of a float dtype, to compare values by their bits."""


@dataclass(frozen=True)
class SparseLayout:
    """The shape and dtype of the matrix that a tensor of bytes stands for."""

    shape: tuple[int, int]
    dtype: torch.dtype


def packed(matrix: Tensor) -> Tensor:
    """The bytes (uint8) of a matrix; ``unpacked`` gives it back to the bit.

    First the nonzero values, row by row, then the mask, eight entries to a byte, the first entry
    in the highest bit.
    """
    flat = matrix.detach().contiguous().flatten()
    # By its bits: a zero with a sign is stored, and so is NaN.
    nonzero = flat.view(BITS[flat.element_size()]) != 0
    mask = torch.from_numpy(np.packbits(nonzero.numpy()))
    return torch.cat([flat[nonzero].view(torch.uint8), mask])


def mask_bytes(shape: Sequence[int]) -> int:
    """The number of bytes of a matrix's mask."""
    return -(-shape[0] * shape[1] // 8)


def unpacked(data: Tensor, layout: SparseLayout, name: str) -> Tensor:
    """The matrix from which ``packed`` made these bytes; all is checked before it is used.

    Raises:
        ProtocolError: the bytes are not those of a matrix of this shape and dtype.
    """
    shape, dtype = layout.shape, layout.dtype
    entries, size = shape[0] * shape[1], dtype.itemsize
    value_bytes = data.numel() - mask_bytes(shape)
    if value_bytes < 0 or value_bytes % size:
        raise ProtocolError(
            f"Tensor {name[:80]!r} has {data.numel()} bytes, which are not a sparse matrix of "
            f"shape {shape} in {dtype}."
        )
    bits = np.unpackbits(data[value_bytes:].numpy())
    nonzero = torch.from_numpy(bits[:entries].astype(np.bool_))
    marked = int(nonzero.sum())
    if marked * size != value_bytes or bits[entries:].any():
        raise ProtocolError(
            f"Tensor {name[:80]!r} marks {marked} of {entries} entries but has "
            f"{value_bytes // size} values."
        )
    flat = torch.zeros(entries, dtype=dtype)
    # A clone, as values must lie at multiples of their size.
    flat[nonzero] = data[:value_bytes].clone().view(dtype)
    return flat.view(shape)


def sparsified(
    tensors: Mapping[str, Tensor], dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, packed if that is smaller, and the entries that a header needs for them."""
    smallest, shapes = dict(tensors), {}
    for name, matrix in tensors.items():
        data, header = packed(matrix), json.dumps({name: list(matrix.shape)})
        if data.numel() + len(header) < matrix.nbytes:
            smallest[name], shapes[name] = data, list(matrix.shape)
    if not shapes:
        return smallest, {}
    dtype_name = next(name for name, each in FLOAT_DTYPES.items() if each == dtype)
    return smallest, {"sparse": {"dtype": dtype_name, "shapes": shapes}}


def sparse_layouts(
    header: Mapping[str, Any], tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]]
) -> dict[str, SparseLayout]:
    """The layouts of the sparse tensors, checked before any value is read.

    ``header`` is untrusted; ``tensors`` are the dtypes and shapes of the tensors present.

    Raises:
        ProtocolError: header and tensors do not fit, or a shape is not valid.
    """
    sparse = header.get("sparse", {"dtype": "F32", "shapes": {}})
    if not isinstance(sparse, dict) or not isinstance(sparse.get("shapes"), dict):
        raise ProtocolError("The header does not say which tensors are sparse, and their shapes.")
    if sparse.get("dtype") not in list(FLOAT_DTYPES):
        raise ProtocolError(
            f"Sparse values have the dtype {str(sparse.get('dtype'))[:40]!r}, not one of "
            f"{list(FLOAT_DTYPES)}."
        )
    byte_tensors = {name for name, (dtype, _) in tensors.items() if dtype == torch.uint8}
    if mismatched := sorted(byte_tensors ^ sparse["shapes"].keys()):
        raise ProtocolError(
            f"Tensor {mismatched[0][:80]!r} is not both of bytes and in the header's list of "
            f"sparse tensors."
        )
    dtype = FLOAT_DTYPES[sparse["dtype"]]
    return {
        name: SparseLayout(_shape(name, tensors[name][1], shape), dtype)
        for name, shape in sparse["shapes"].items()
    }


def _shape(name: str, stored: Sequence[int], shape: object) -> tuple[int, int]:
    """The shape that a header gives, if a tensor of shape ``stored`` can be such a matrix."""
    sides = shape if isinstance(shape, list) else []
    if len(sides) != 2 or any(type(n) is not int or not 0 <= n < LARGEST_SIDE for n in sides):
        raise ProtocolError(
            f"Sparse tensor {name[:80]!r} has the shape {str(shape)[:40]} in the header, which is "
            f"not that of a matrix."
        )
    if len(stored) != 1 or stored[0] < mask_bytes(sides):
        raise ProtocolError(
            f"Sparse tensor {name[:80]!r} of shape {sides} has {list(stored)} bytes, but its mask "
            f"takes {mask_bytes(sides)}."
        )
    return sides[0], sides[1]
