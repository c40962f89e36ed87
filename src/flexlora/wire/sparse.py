"""A sparse matrix as bytes: its nonzero values, then a bit mask with one bit per entry.

The mask costs 1/32 of a dense float32 matrix. A few bytes can stand for 64 times as many, so that
whoever reads such a matrix must know beforehand how large it may be: see ``HeaderLimits``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flexlora.storage.tensors import FLOAT_DTYPES, LARGEST_SIDE, StoredTensor
from flexlora.storage.untrusted import RefusalCode, short
from flexlora.wire.refused import RefusedMessage

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
        RefusedMessage: the bytes are not those of a matrix of this shape and dtype.
    """
    shape, dtype = layout.shape, layout.dtype
    entries, size = shape[0] * shape[1], dtype.itemsize
    value_bytes = data.numel() - mask_bytes(shape)
    if value_bytes < 0 or value_bytes % size:
        raise _refused(
            f"Tensor {short(name)} has {data.numel()} bytes, which are not a sparse matrix of "
            f"shape {shape} in {dtype}."
        )
    bits = np.unpackbits(data[value_bytes:].numpy())
    nonzero = torch.from_numpy(bits[:entries].astype(np.bool_))
    marked = int(nonzero.sum())
    if marked * size != value_bytes or bits[entries:].any():
        raise _refused(
            f"Tensor {short(name)} marks {marked} of {entries} entries but has "
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
    header: Mapping[str, Any],
    tensors: Mapping[str, StoredTensor],
    dtypes: Mapping[str, torch.dtype] = FLOAT_DTYPES,
) -> dict[str, SparseLayout]:
    """The layouts of the sparse tensors, checked before any value is read.

    ``header`` is untrusted; ``tensors`` are those present, and ``dtypes`` those that values may
    have.

    Raises:
        RefusedMessage: header and tensors do not fit, or a shape is not valid.
    """
    sparse = header.get("sparse", {"dtype": next(iter(dtypes), None), "shapes": {}})
    if sparse.keys() != {"dtype", "shapes"} or not isinstance(sparse["shapes"], dict):
        raise _refused("The header does not say which tensors are sparse, and their shapes.")
    name, shapes = sparse["dtype"], sparse["shapes"]
    if not isinstance(name, str) or name not in dtypes:
        raise RefusedMessage(
            RefusalCode.WRONG_DTYPE,
            f"Sparse values have the dtype {short(name)}, not one of {list(dtypes)}.",
        )
    packed_names = {name for name, tensor in tensors.items() if tensor.dtype == torch.uint8}
    if mismatched := packed_names ^ shapes.keys():
        raise _refused(
            f"Tensor {short(min(mismatched))} is not both of bytes and in the header's list of "
            f"sparse tensors."
        )
    dtype = dtypes[name]
    return {
        name: SparseLayout(_shape(tensors[name], shape, dtype), dtype)
        for name, shape in shapes.items()
    }


def _shape(stored: StoredTensor, shape: object, dtype: torch.dtype) -> tuple[int, int]:
    """The shape that a header gives, if a tensor like ``stored`` can be such a matrix."""
    sides = shape if isinstance(shape, list) else []
    if len(sides) != 2 or any(type(n) is not int or not 0 <= n < LARGEST_SIDE for n in sides):
        raise _refused(
            f"Sparse tensor {short(stored.name)} has the shape {short(shape)} in the header, which "
            f"is not that of a matrix."
        )
    least, dense = mask_bytes(sides), sides[0] * sides[1] * dtype.itemsize
    if len(stored.shape) != 1 or not least <= stored.bytes < dense:
        raise _refused(
            f"Sparse tensor {short(stored.name)} of shape {sides} has {list(stored.shape)} bytes, "
            f"but its mask takes {least}, and without its zeros it has to be smaller than the "
            f"{dense} bytes with them."
        )
    return sides[0], sides[1]


def _refused(reason: str) -> RefusedMessage:
    return RefusedMessage(RefusalCode.WRONG_SPARSE, reason)
