"""An adapter and a JSON header as bytes or as a file; the bytes are counted as traffic.

The format is safetensors with the tensors ``<module>.A`` and ``<module>.B``, and the header under
the metadata key ``flexlora``. A tensor of dtype uint8 is sparse, as ``sparse`` packs it; the
header gives its shape and the dtype of its values. Nothing else from the network is ever parsed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from flexlora.errors import AdapterError, ProtocolError
from flexlora.lowrank import Adapter, Factors
from flexlora.storage.tensors import TensorFile, open_tensors
from flexlora.wire.sparse import SparseLayout, sparse_layouts, sparsified, unpacked

FORMAT = 2
"""Raised whenever messages change; 1 was that of earlier development versions."""

NUMBER_CHARACTERS = 25
"""What every fact takes in a header: the digits of a time must not change a message's length."""


def encode(
    adapter: Adapter, header: Mapping[str, Any], dtype: torch.dtype, sparse: bool = False
) -> bytes:
    """The adapter and a JSON header as bytes; the same input always gives the same bytes.

    With ``sparse``, every tensor that is smaller without its zeros is packed.

    Raises:
        ValueError: the header is not valid JSON, for example as a number is NaN.
    """
    tensors = {}
    for module, factors in adapter.items():
        tensors[f"{module}.A"] = factors.A.detach().to(dtype).contiguous()
        tensors[f"{module}.B"] = factors.B.detach().to(dtype).contiguous()
    if sparse:
        tensors, sparse_header = sparsified(tensors, dtype)
        header = {**header, **sparse_header}
    text = json.dumps({"format": FORMAT, **header}, sort_keys=True, allow_nan=False)
    facts = header.get("facts", {}).values()
    text += " " * sum(NUMBER_CHARACTERS - len(json.dumps(value)) for value in facts)
    return safetensors.torch.save(_separate(tensors), metadata={"flexlora": text})


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, with a copy of each that lies in the memory of an earlier one.

    The safetensors library refuses tensors that overlap, such as an adapter that a method stores
    in its state under two names.
    """
    memories: set[int] = set()
    separate = {}
    for name, tensor in tensors.items():
        memory = tensor.untyped_storage().data_ptr()
        separate[name] = tensor.clone() if memory in memories else tensor
        memories.add(memory)
    return separate


def decode(data: bytes) -> tuple[Adapter, dict[str, Any]]:
    """The adapter, in the dtype in which it was sent, and the header.

    Raises:
        ProtocolError: the bytes are not an output of ``encode``.
    """
    header = _header(data[: 8 + _header_length(data)])
    try:
        tensors = safetensors.torch.load(data)
    except Exception as error:
        raise ProtocolError(f"The bytes received are not an adapter: {error}.") from error
    modules = _modules(tensors, "the bytes received")
    layouts = sparse_layouts(header, {name: (t.dtype, t.shape) for name, t in tensors.items()})
    for name, layout in layouts.items():
        tensors[name] = unpacked(tensors[name], layout, name)
    adapter = Adapter({m: Factors(tensors[f"{m}.B"], tensors[f"{m}.A"]) for m in modules})
    return adapter, header


def open_file(path: Path) -> tuple[Adapter, dict[str, Any]]:
    """As ``decode``, but for a file whose modules are read on look-up.

    The file's header is checked and parsed once, not for every module.

    Raises:
        ProtocolError: the file is not an output of ``encode``.
    """
    try:
        file = open_tensors(path)
    except AdapterError as error:
        raise ProtocolError(str(error)) from error
    names = tuple(_modules(file.tensors, str(path)))
    header = _parsed(file.metadata.get("flexlora"))
    layouts = sparse_layouts(header, {n: (t.dtype, t.shape) for n, t in file.tensors.items()})
    return Adapter(StoredModules(file, names, layouts)), header


def stored_at(adapter: Adapter) -> Path | None:
    """The file from which an adapter is read; None if it is in memory."""
    return adapter.modules.path if isinstance(adapter.modules, StoredModules) else None


@dataclass(frozen=True)
class StoredModules(Mapping[str, Factors]):
    """Modules in a file, read one at a time; nothing stays in memory.

    Raises:
        OSError: on look-up, the file can no longer be opened or read.
        ProtocolError: on look-up, the file was cut off, or a sparse tensor is not valid.
    """

    file: TensorFile
    names: tuple[str, ...]
    layouts: Mapping[str, SparseLayout]

    @property
    def path(self) -> Path:
        """Where the file lies."""
        return self.file.path

    def __getitem__(self, module: str) -> Factors:
        names = f"{module}.B", f"{module}.A"
        try:
            tensors = self.file.read(*names)
        except AdapterError as error:
            raise ProtocolError(str(error)) from error
        B, A = (self._unpacked(*each) for each in zip(names, tensors, strict=True))
        return Factors(B, A)

    def rank(self, module: str) -> int:
        """The rank of a module, from the header."""
        name = f"{module}.A"
        layout = self.layouts.get(name)
        shape = self.file.tensors[name].shape if layout is None else layout.shape
        return int(shape[0])

    def _unpacked(self, name: str, tensor: Tensor) -> Tensor:
        layout = self.layouts.get(name)
        return tensor if layout is None else unpacked(tensor, layout, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def _header_length(data: bytes) -> int:
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > len(data) - 8:
        raise ProtocolError(
            f"The {len(data)} bytes received are not an adapter: their header is cut off."
        )
    return length


def _header(head: bytes) -> dict[str, Any]:
    try:
        metadata = json.loads(head[8:])["__metadata__"]
        text = metadata["flexlora"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ProtocolError("The bytes received have no flexlora header.") from error
    return _parsed(text)


def _parsed(text: str | None) -> dict[str, Any]:
    """The flexlora header from its text, after a check of its format number."""
    try:
        header = json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError) as error:
        raise ProtocolError("The adapter's flexlora header is not JSON.") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        format = header.get("format") if isinstance(header, dict) else None
        raise ProtocolError(
            f"The adapter's header has format {format!r}; this version reads format {FORMAT}. "
            f"Run the same version of flexlora on both sides."
        )
    return header


def _modules(names: Iterable[str], place: str) -> list[str]:
    """The names of the modules, after a check that each has both factors."""
    names = set(names)
    modules = sorted({name[:-2] for name in names if name[-2:] in (".A", ".B")})
    for module in modules:
        for factor in ("A", "B"):
            if f"{module}.{factor}" not in names:
                raise ProtocolError(f"{place}: module {module!r} has no {factor}.")
    if len(names) != 2 * len(modules):
        unknown = sorted(name for name in names if name[-2:] not in (".A", ".B"))
        raise ProtocolError(f"{place}: unknown tensor {unknown[0]!r}.")
    return modules
