"""What a message claims to hold, checked from its header alone.

``read_header`` is the one way into a message of somebody else: it costs the header, whatever the
rest of the message is, and what it returns tells how much memory the adapters will take. Only then
are tensors read.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import torch

from flexlora.storage.tensors import FLOAT_DTYPES, StoredTensor
from flexlora.storage.tensors import read_header as tensors_of
from flexlora.storage.untrusted import RefusalCode, RefusedBytes, short
from flexlora.wire.fields import is_name, is_section, parsed
from flexlora.wire.refused import RefusedMessage
from flexlora.wire.sparse import SparseLayout, sparse_layouts

LARGEST_HEADER = 16 * 2**20
"""In bytes, where nothing smaller follows from what is expected: some 100,000 tensors."""

_BYTES = {"U8": torch.uint8}


@dataclass(frozen=True)
class HeaderLimits:
    """What a message may claim in its header.

    ``kind`` is the kind of message, None for any; ``dtypes`` those of its values; ``sparse``
    whether tensors may travel without their zeros. ``header_bytes`` and ``message_bytes`` bound the
    message, ``dense_bytes`` what its adapters take in memory, zeros included; None is no bound.
    """

    kind: str | None = None
    dtypes: Collection[torch.dtype] = tuple(FLOAT_DTYPES.values())
    sparse: bool = True
    header_bytes: int = LARGEST_HEADER
    message_bytes: int | None = None
    dense_bytes: int | None = None


ANY = HeaderLimits()
"""For files of our own."""


@dataclass(frozen=True)
class ModuleShape:
    """One module of a message: ``shape`` is (out, in) of ``B @ A``."""

    shape: tuple[int, int]
    rank: int
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """What both factors take in memory."""
        return self.rank * sum(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class MessageHeader:
    """The checked header of a message; no tensor was read for it.

    ``fields`` are those of ``wire.fields``. ``sections`` are the message's adapters by name, ""
    being its own, and by module. ``tensors`` and ``layouts`` say where and how the values lie.
    """

    kind: str
    fields: Mapping[str, Any]
    sections: Mapping[str, Mapping[str, ModuleShape]]
    message_bytes: int
    tensors: Mapping[str, StoredTensor] = field(repr=False)
    layouts: Mapping[str, SparseLayout] = field(repr=False)

    @property
    def modules(self) -> list[str]:
        """The modules of all sections as they travel, ``<section>/<module>``, in order."""
        return sorted(name[:-2] for name in self.tensors if name.endswith(".A"))

    @property
    def dense_bytes(self) -> int:
        """What all adapters of the message take in memory together, in bytes."""
        return sum(m.bytes for modules in self.sections.values() for m in modules.values())


def read_header(message: bytes | Path, limits: HeaderLimits = ANY) -> MessageHeader:
    """The header of a message, or of a file that has one, checked; nothing else is read.

    Sizes are compared before anything is parsed. All of the header is checked: keys, types, names,
    dtypes, shapes and places of tensors, that both factors of a module fit, and that the file has
    no other byte. What it holds for the receiver is up to the caller. Memory: at most some 30
    times the bytes of the header.

    Raises:
        RefusedMessage: a check fails, or the file cannot be read.
    """
    if isinstance(message, bytes):
        return _read(BytesIO(message), len(message), "The message", limits)
    try:
        with message.open("rb") as file:
            return _read(file, os.fstat(file.fileno()).st_size, message, limits)
    except OSError as error:
        raise RefusedMessage(
            RefusalCode.UNREADABLE, f"{message} cannot be read: {short(error)}."
        ) from error


def _read(file: BinaryIO, size: int, place: Path | str, limits: HeaderLimits) -> MessageHeader:
    if limits.message_bytes is not None and size > limits.message_bytes:
        raise RefusedMessage(
            RefusalCode.WRONG_SIZE,
            f"{place} has {size} bytes, and at most {limits.message_bytes} are expected.",
        )
    dtypes = {name: dtype for name, dtype in FLOAT_DTYPES.items() if dtype in limits.dtypes}
    try:
        tensors, metadata = tensors_of(
            file, size, place, dtypes | (_BYTES if limits.sparse else {}), limits.header_bytes
        )
    except RefusedBytes as error:
        raise RefusedMessage(error.code, str(error)) from error
    if unknown := metadata.keys() - {"flexlora"}:
        raise RefusedMessage(
            RefusalCode.UNKNOWN_KEY,
            f"{place}: the metadata has an unknown key {short(min(unknown))}.",
        )
    fields = parsed(metadata.get("flexlora"), limits.kind, place)
    if "sparse" in fields and not limits.sparse:
        raise RefusedMessage(
            RefusalCode.UNKNOWN_KEY,
            f"{place}: the {fields['kind']} has no reason to be sparse; its method sends no zeros.",
        )
    layouts = sparse_layouts(fields, tensors, dtypes)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    shapes |= {name: layout.shape for name, layout in layouts.items()}
    kinds = {name: tensor.dtype for name, tensor in tensors.items()}
    kinds |= {name: layout.dtype for name, layout in layouts.items()}
    sections = _sections(shapes, kinds, fields["kind"], place)
    header = MessageHeader(fields["kind"], fields, sections, size, tensors, layouts)
    if limits.dense_bytes is not None and header.dense_bytes > limits.dense_bytes:
        raise RefusedMessage(
            RefusalCode.TOO_LARGE,
            f"{place}: the adapters would take {header.dense_bytes} bytes in memory, and at most "
            f"{limits.dense_bytes} are allowed.",
        )
    return header


def _sections(
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, torch.dtype],
    kind: str,
    place: Path | str,
) -> dict[str, dict[str, ModuleShape]]:
    """The modules of every section, after a check that each has two factors that fit."""
    sections: dict[str, dict[str, ModuleShape]] = {}
    for name in sorted(shapes):
        key, _, factor = name.rpartition(".")
        section, slash, module = key.rpartition("/")
        known = is_section(section, kind) if slash else True
        if factor not in ("A", "B") or not is_name(module) or not known:
            raise RefusedMessage(
                RefusalCode.UNKNOWN_TENSOR, f"{place}: unknown tensor {short(name)}."
            )
        other = f"{key}.{'B' if factor == 'A' else 'A'}"
        if other not in shapes:
            raise RefusedMessage(
                RefusalCode.MISSING_TENSOR,
                f"{place}: module {short(key)} has no {other[-1]}.",
            )
        if factor == "A":
            stored = _module(key, shapes, dtypes, place)
            sections.setdefault(section, {})[module] = stored
    return sections


def _module(
    key: str,
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, torch.dtype],
    place: Path | str,
) -> ModuleShape:
    """The shape, rank and dtype of one module, which both of its factors must have."""
    B, A = (shapes[f"{key}.{factor}"] for factor in "BA")
    if len(B) != 2 or len(A) != 2:
        raise RefusedMessage(
            RefusalCode.WRONG_SHAPE,
            f"{place}: the factors of module {short(key)} have the shapes {short(B)} and "
            f"{short(A)}, which are not those of matrices.",
        )
    if B[1] != A[0]:
        raise RefusedMessage(
            RefusalCode.WRONG_RANK,
            f"{place}: the factors of module {short(key)} have the shapes {short(B)} and "
            f"{short(A)}: their ranks, {B[1]} and {A[0]}, differ.",
        )
    if dtypes[f"{key}.B"] != dtypes[f"{key}.A"]:
        raise RefusedMessage(
            RefusalCode.WRONG_DTYPE,
            f"{place}: the factors of module {short(key)} have two dtypes, "
            f"{dtypes[f'{key}.B']} and {dtypes[f'{key}.A']}.",
        )
    return ModuleShape((B[0], A[1]), B[1], dtypes[f"{key}.A"])
