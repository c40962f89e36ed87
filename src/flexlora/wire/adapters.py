"""An adapter and a JSON header as bytes or as a file; the bytes are counted as traffic.

The format is safetensors with the tensors ``<module>.A`` and ``<module>.B``, and the header under
the metadata key ``flexlora``. A tensor of dtype uint8 is sparse, as ``sparse`` packs it; the
header gives its shape and the dtype of its values. Nothing else from the network is ever parsed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from flexlora.errors import AdapterError, ProtocolError
from flexlora.lowrank import Adapter, Factors
from flexlora.storage.tensors import TensorFile, read_tensor
from flexlora.wire.fields import header_text
from flexlora.wire.header import ANY, HeaderLimits, MessageHeader, read_header
from flexlora.wire.sparse import SparseLayout, sparsified, unpacked


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
    metadata = {"flexlora": header_text(header)}
    return safetensors.torch.save(_separate(tensors), metadata=metadata)


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


def decode(data: bytes, limits: HeaderLimits = ANY) -> tuple[Adapter, dict[str, Any]]:
    """The adapter, in the dtype in which it was sent, and the fields of the header.

    Raises:
        RefusedMessage: the bytes are not an output of ``encode``, or not within the limits.
    """
    header, file = read_header(data, limits), BytesIO(data)
    tensors = {}
    for name, stored in header.tensors.items():
        tensors[name] = read_tensor(file, stored, "The message")
        if name in header.layouts:
            tensors[name] = unpacked(tensors[name], header.layouts[name], name)
    modules = header.modules
    adapter = Adapter({m: Factors(tensors[f"{m}.B"], tensors[f"{m}.A"]) for m in modules})
    return adapter, dict(header.fields)


def open_file(path: Path, limits: HeaderLimits = ANY) -> tuple[Adapter, dict[str, Any]]:
    """As ``decode``, but for a file whose modules are read on look-up.

    The file's header is checked and parsed once, not for every module.

    Raises:
        RefusedMessage: the file is not an output of ``encode``, or not within the limits.
    """
    header = read_header(path, limits)
    return stored_adapter(path, header), dict(header.fields)


def stored_adapter(path: Path, header: MessageHeader) -> Adapter:
    """The adapter in a file whose header was checked; modules are read on look-up."""
    file = TensorFile(path, header.tensors, {})
    return Adapter(StoredModules(file, tuple(header.modules), header.layouts))


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

    def __contains__(self, module: object) -> bool:
        return module in self.names

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
