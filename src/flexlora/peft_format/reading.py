"""Reading a PEFT directory: the header first, values when they are asked for."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flexlora.errors import AdapterError
from flexlora.lowrank import Adapter, Factors
from flexlora.peft_format.config import (
    CONFIG,
    Settings,
    Unsupported,
    parse_json,
    read_config,
    refuse_variants,
    settings_of,
    short,
)
from flexlora.peft_format.patterns import matched

WEIGHTS = "adapter_model.safetensors"


DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""The number formats read, by their names in a safetensors header."""


PREFIX = "base_model.model."


_KEY = re.compile(rf"{re.escape(PREFIX)}(?P<module>.+)\.lora_(?P<half>[AB])\.weight")


MODULE = re.compile(r"[A-Za-z0-9_\-]+(\.[A-Za-z0-9_\-]+)*")


MODULE_CHARACTERS = 512


_HEADER_BYTES = 32 << 20


_PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth", "adapter_model.pkl")


_CONVERT = (
    "convert it with PEFT on a machine you trust, save_pretrained(..., safe_serialization=True)"
)


@dataclass(frozen=True)
class Span:
    """Where one tensor lies in a safetensors file: ``start`` and ``bytes`` count from 0."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, int]
    start: int
    bytes: int


@dataclass(frozen=True)
class Layer:
    """What header and configuration say about one module, before any value is read."""

    A: Span
    B: Span
    alpha: float
    scale: float

    @property
    def rank(self) -> int:
        """The rank of the stored factors."""
        return self.A.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """The shape (out, in) of the update."""
        return self.B.shape[0], self.A.shape[1]

    @property
    def parameters(self) -> int:
        """How many numbers are stored."""
        return self.rank * sum(self.shape)


@dataclass(frozen=True, eq=False)
class StoredFactors(Mapping[str, Factors]):
    """Factors that stay in their file; each look-up reads one module, and keeps nothing.

    The scale is folded into ``B`` in float32, or float64 where stored or wanted so.

    Raises:
        AdapterError: on look-up, a value is NaN or infinite, or the file has changed.
    """

    weights: Path
    layers: Mapping[str, Layer]
    dtype: torch.dtype | None
    stamp: tuple[int, int, int]

    def __getitem__(self, module: str) -> Factors:
        layer = self.layers[module]
        try:
            with self.weights.open("rb") as file:
                if _stamp(os.fstat(file.fileno())) != self.stamp:
                    raise AdapterError(
                        f"{self.weights} has changed since it was opened; read the adapter again."
                    )
                A, B = (_values(file, span, self.weights) for span in (layer.A, layer.B))
        except OSError as error:
            raise AdapterError(
                f"{self.weights} can no longer be read ({error.strerror}); restore the file."
            ) from error
        stored = torch.promote_types(A.dtype, B.dtype)
        dtype = self.dtype or stored
        exact = torch.promote_types(torch.promote_types(stored, dtype), torch.float32)
        factors = Factors((B.to(exact) * layer.scale).to(dtype), A.to(dtype))
        if not (factors.B.isfinite().all() and factors.A.isfinite().all()):
            raise AdapterError(
                f"{self.weights}: {module!r} overflows {dtype} once its scale {layer.scale:g} "
                f"is folded in; read it as torch.float32 or torch.float64."
            )
        return factors

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __contains__(self, module: object) -> bool:
        return module in self.layers


@dataclass(frozen=True, eq=False)
class PeftAdapter:
    """A LoRA adapter as read from ``directory``; its ``adapter`` has the scale folded in.

    ``layers`` holds what can be told without reading values; ``config`` is the raw
    ``adapter_config.json``.
    """

    directory: Path
    adapter: Adapter
    layers: Mapping[str, Layer]
    base_model: str | None
    task_type: str | None
    config: dict[str, Any]

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of each module, from the header alone."""
        return {module: layer.rank for module, layer in self.layers.items()}

    def loaded(self) -> PeftAdapter:
        """The same with every value in memory, and so checked.

        Raises:
            AdapterError: as for a look-up in `StoredFactors`.
        """
        return dataclasses.replace(self, adapter=Adapter(dict(self.adapter)))


def read(directory: Path, dtype: torch.dtype | None = torch.float32) -> PeftAdapter:
    """Open a PEFT LoRA directory: everything is checked now but the values.

    Values are read module by module when asked for, converted to ``dtype``, or left as
    stored if ``dtype`` is None; merging many adapters thus holds one module of each.
    Costs one pass over the header. Nothing is ever unpickled.

    Raises:
        Unsupported: the adapter is not a plain ``B @ A`` for each module (DoRA, biases,
            retrained modules, initialisations that change the base model, ...).
        AdapterError: anything is missing, malformed or inconsistent.
    """
    config = read_config(directory)
    refuse_variants(config, directory / CONFIG)
    settings = settings_of(config, directory / CONFIG)
    weights = _weights_file(directory)
    spans, stamp = _header(weights)
    layers = _layers(_halves(spans, weights), settings, directory)
    return PeftAdapter(
        directory=directory,
        adapter=Adapter(StoredFactors(weights, layers, dtype, stamp)),
        layers=layers,
        base_model=settings.base_model_name_or_path,
        task_type=settings.task_type,
        config=config,
    )


def _weights_file(directory: Path) -> Path:
    path = directory / WEIGHTS
    if path.is_file():
        return path
    pickles = [name for name in _PICKLES if (directory / name).exists()]
    if pickles:
        raise AdapterError(
            f"{directory / pickles[0]} is a pickle, which can run any program when loaded, "
            f"and is not read; {_CONVERT}."
        )
    raise AdapterError(f"{path} is missing; save the adapter again with PEFT.")


def _header(path: Path) -> tuple[dict[str, Span], tuple[int, int, int]]:
    """The float matrices in a safetensors file, once safetensors has found it sound."""
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            start = file.read(16)
            length = int.from_bytes(start[:8], "little")
            file.seek(8)
            header = file.read(min(length, _HEADER_BYTES))
        if len(start) < 16 or start[8:9] != b"{" or length > status.st_size - 8:
            raise AdapterError(_recognised(start, status.st_size))
        if length > _HEADER_BYTES:
            raise AdapterError(f"its header has {length} bytes, and {_HEADER_BYTES} are allowed")
        with safe_open(path, framework="pt"):
            entries = parse_json(header)
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise AdapterError(
            f"{path} is not a sound safetensors file: {short(error)}; copy it again, or save "
            f"the adapter again with PEFT."
        ) from error
    entries.pop("__metadata__", None)
    if not entries:
        raise AdapterError(f"{path} holds no tensors; save the trained adapter again with PEFT.")
    data = range(8 + length, status.st_size)
    spans = {key: _span(key, entry, data, path) for key, entry in entries.items()}
    return spans, _stamp(status)


def _stamp(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_ino, status.st_size, status.st_mtime_ns


def _recognised(start: bytes, size: int) -> str:
    """What a file that is not safetensors is."""
    if start.startswith(b"PK\x03\x04"):
        return f"it is a zip, as PyTorch's pickles are, and is not read ({_CONVERT})"
    if start[:1] == b"\x80" and start[1:2] in b"\x02\x03\x04\x05" and start[8:9] != b"{":
        return f"it is a pickle, and is not read ({_CONVERT})"
    if start.startswith(b"version https://"):
        return "it is a Git LFS pointer (fetch the file itself with `git lfs pull`)"
    if start.startswith(b"GGUF"):
        return "it is a GGUF file (give the PEFT adapter that it was made from)"
    return f"it was cut off at {size} bytes, or is of another kind"


def _span(key: str, entry: Any, data: range, path: Path) -> Span:
    match = _KEY.fullmatch(key)
    if not match:
        raise _strange_key(key, path)
    module = match["module"]
    if len(module) > MODULE_CHARACTERS or not MODULE.fullmatch(module):
        raise AdapterError(
            f"{path}: {short(key)} names no module; give letters, digits, _ and -, joined by "
            f"dots, at most {MODULE_CHARACTERS} characters."
        )
    # safetensors has checked this; but it also takes a list for the object, and another
    # program may have put another file in place since.
    match entry:
        case {"dtype": str(name), "shape": [*shape], "data_offsets": [int(first), int(last)]}:
            pass
        case _:
            raise AdapterError(
                f"{path}: the header's entry for {short(key)} does not say dtype, shape and "
                f"data_offsets; save the adapter again with PEFT."
            )
    if name not in DTYPES:
        raise AdapterError(
            f"{path}: {short(key)} has the dtype {short(name)}, not one of "
            f"{', '.join(DTYPES)}; save the adapter in one of these."
        )
    if len(shape) != 2 or not all(isinstance(size, int) and size > 0 for size in shape):
        raise AdapterError(
            f"{path}: {short(key)} has the shape {short(shape)}, and only matrices that "
            f"are not empty are read; save a linear layer's adapter, with gathered weights."
        )
    length = math.prod(shape) * DTYPES[name].itemsize
    if not (first >= 0 and last - first == length and last <= len(data)):
        raise AdapterError(
            f"{path}: {short(key)} does not lie within the file; copy the file again."
        )
    return Span(key, DTYPES[name], (shape[0], shape[1]), data.start + first, length)


def _strange_key(key: str, path: Path) -> ValueError:
    plain = "merge it into its base model with PEFT, or train a plain LoRA"
    named = re.search(r"\.lora_[AB]\.([^.]+)\.weight$", key)
    if "lora_magnitude_vector" in key:
        return Unsupported(f"{path}: {short(key)} belongs to DoRA, not to B @ A; {plain}.")
    if "lora_embedding_" in key:
        return Unsupported(f"{path}: {short(key)} adapts an embedding, not a matrix; {plain}.")
    if key.endswith(".bias"):
        return Unsupported(f"{path}: {short(key)} is a trained bias, not B @ A; {plain}.")
    if key.startswith(PREFIX) and named:
        return ValueError(
            f"{path}: {short(key)} carries the adapter name {short(named[1])}, as in "
            f"memory; save it with PEFT's save_pretrained, which leaves the name out."
        )
    if key.startswith(PREFIX) and ".lora_" not in key:
        return Unsupported(
            f"{path}: {short(key)} is a whole tensor (modules_to_save, or a resized "
            f"embedding), not B @ A; {plain}."
        )
    return ValueError(
        f"{path}: {short(key)} is not of the form {PREFIX}MODULE.lora_A.weight (or lora_B) "
        f"that PEFT writes; save the adapter with PEFT."
    )


def _halves(spans: Mapping[str, Span], path: Path) -> dict[str, tuple[Span, Span]]:
    """Each module's A and B, in the order of their names."""
    halves = {}
    for module in sorted({key[len(PREFIX) : -len(".lora_A.weight")] for key in spans}):
        keys = [f"{PREFIX}{module}.lora_{half}.weight" for half in "AB"]
        for key, other in (keys, keys[::-1]):
            if key not in spans:
                raise AdapterError(
                    f"{path}: {short(other)} is there but {short(key)} is missing; save the "
                    f"adapter again with PEFT."
                )
        A, B = (spans[key] for key in keys)
        if A.shape[0] != B.shape[1]:
            raise AdapterError(
                f"{path}: {short(A.key)} is {A.shape} (rank, in) and {short(B.key)} is "
                f"{B.shape} (out, rank): their ranks differ; save the adapter again with PEFT."
            )
        halves[module] = A, B
    return halves


def _layers(
    halves: Mapping[str, tuple[Span, Span]], settings: Settings, directory: Path
) -> dict[str, Layer]:
    path = directory / CONFIG
    modules = list(halves)
    _refuse_untargeted(modules, settings.target_modules, directory)
    ranks = matched(settings.rank_pattern or {}, modules, f"{path}: rank_pattern")
    alphas = matched(settings.alpha_pattern or {}, modules, f"{path}: alpha_pattern")
    layers = {}
    for module, (A, B) in halves.items():
        rank = next(iter(ranks[module]), settings.r)
        if A.shape[0] != rank:
            raise AdapterError(
                f"{directory / WEIGHTS}: {short(A.key)} has rank {A.shape[0]}, but {path} "
                f"says {rank} (r and rank_pattern); put right the one that is wrong."
            )
        alpha = next(iter(alphas[module]), settings.lora_alpha)
        scale = alpha / (math.sqrt(rank) if settings.use_rslora else rank)
        layers[module] = Layer(A, B, alpha, scale)
    return layers


def _refuse_untargeted(
    modules: Sequence[str], targets: list[str] | str | None, directory: Path
) -> None:
    # A regular expression was evaluated by whoever trained the adapter; the tensors say
    # what it chose. A list is cheap to check, and PEFT drops what it does not name.
    if not isinstance(targets, list):
        return
    names = set(targets)
    for module in modules:
        parts = module.split(".")
        if not any(".".join(parts[start:]) in names for start in range(len(parts))):
            raise AdapterError(
                f"{directory / WEIGHTS} adapts {module!r}, which target_modules in "
                f"{directory / CONFIG} does not name, so that PEFT would leave it out; add it "
                f"there or remove its tensors."
            )


def _values(file: BufferedReader, span: Span, path: Path) -> Tensor:
    data = bytearray(span.bytes)
    file.seek(span.start)
    if file.readinto(data) != span.bytes:
        raise AdapterError(f"{path} ends within {short(span.key)}; copy the file again.")
    values = torch.frombuffer(data, dtype=span.dtype).view(span.shape)
    if not values.isfinite().all():
        raise AdapterError(
            f"{path}: {short(span.key)} holds NaN or infinite values; the training diverged, "
            f"so take an earlier checkpoint."
        )
    return values
