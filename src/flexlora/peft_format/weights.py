"""An adapter's tensors: finding their files, and pairing them by module."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from flexlora.errors import AdapterError
from flexlora.peft_format.config import Unsupported
from flexlora.peft_format.layouts import (
    INDEX,
    SHARD,
    WEIGHTS,
    other_start,
    refuse_missing_weights,
)
from flexlora.peft_format.names import (
    BASE_COPY,
    FACTOR,
    PLAIN,
    PREFIX,
    Names,
    check_module_name,
    is_part,
    peft_names,
    unexpected,
)
from flexlora.storage.tensors import FLOAT_DTYPES, StoredTensor, TensorFile, open_tensors
from flexlora.storage.untrusted import parse_json, short

_IN_MEMORY = re.compile(r"\.(lora_\w+|modules_to_save|original_module)\.")
"""Parts of the names that a state dict in memory has for a module trained as a whole."""

_LARGEST_HEADER = 32 << 20

_LARGEST_INDEX = 32 << 20


@dataclass(frozen=True)
class Weights:
    """The tensors of one adapter by the names that PEFT writes, in one file or several shards.

    ``path`` is the file that messages name: the file, or the index of the shards.
    """

    path: Path
    tensors: Mapping[str, StoredTensor]
    files: Mapping[str, TensorFile]
    names: Names

    @property
    def sharded(self) -> bool:
        """Whether there are several files, which PEFT does not load."""
        return self.path.name != WEIGHTS

    @property
    def bytes(self) -> int:
        """The size of the files."""
        return sum(path.stat().st_size for path in {file.path for file in self.files.values()})

    def read(self, *names: str) -> list[Tensor]:
        """Read the named tensors, in this order.

        Raises:
            AdapterError: a file cannot be read any more, or has changed.
        """
        try:
            return [self.files[name].read(self.tensors[name].name)[0] for name in names]
        except OSError as error:
            raise AdapterError(
                f"{self.path} can no longer be read ({error.strerror}); restore the file."
            ) from error


@dataclass(frozen=True)
class Pair:
    """The factors of one module: ``A`` (rank, in) and ``B`` (out, rank), by PEFT's names.

    Of an embedding, which PEFT applies as ``(B @ A).T``, ``in`` is the vocabulary and ``out`` the
    width.
    """

    A: str
    B: str
    embedding: bool


def open_weights(directory: Path) -> Weights:
    """Open an adapter's tensors after a check of their headers; nothing is ever unpickled.

    Raises:
        AdapterError: a file is missing, of another format, damaged or empty, or its dtypes
            are not floats.
    """
    path, shards = _files(directory)
    files = [_open(shard) for shard in shards]
    owners = {name: file for file in files for name in file.tensors}
    count = sum(len(file.tensors) for file in files)
    if count > len(owners):
        raise AdapterError(f"{path}: a tensor is in two of the shards; save the adapter again.")
    if not owners:
        raise AdapterError(f"{path} contains no tensors; save the trained adapter again with PEFT.")
    names = peft_names(list(owners), path)
    return Weights(
        path=path,
        tensors={name: owners[old].tensors[old] for name, old in names.stored.items()},
        files={name: owners[old] for name, old in names.stored.items()},
        names=names,
    )


@dataclass(frozen=True)
class Contents:
    """What an adapter's tensors are, each table sorted by its keys.

    ``pairs`` are the factors by module, ``copies`` the names of base weights saved beside factors,
    by module, and ``whole`` the names of the tensors of modules that were trained as a whole, by
    the path of the parameter.
    """

    pairs: Mapping[str, Pair]
    copies: Mapping[str, str]
    whole: Mapping[str, str]


def contents(weights: Weights, saved: Sequence[str] = ()) -> Contents:
    """What the tensors are; ``saved`` are the names in ``modules_to_save``.

    Raises:
        Unsupported: a tensor belongs to an adapter that is more than ``B @ A``.
        AdapterError: a tensor has another name or shape, or is missing, or ranks differ.
    """
    modules: dict[str, bool] = {}
    copies: dict[str, str] = {}
    whole: dict[str, str] = {}
    for name, tensor in weights.tensors.items():
        match = FACTOR.fullmatch(name)
        if match:
            _check_tensor(name, match["module"], tensor, weights.path)
            modules[match["module"]] = bool(match["embedding"])
        elif name.startswith(PREFIX) and name.endswith(BASE_COPY):
            copies[name[len(PREFIX) : -len(BASE_COPY)]] = name
        elif is_part(name, saved) and not _IN_MEMORY.search(name):
            whole[name.removeprefix(PREFIX)] = name
        else:
            raise unexpected(name, weights.path)
    pairs = {module: _pair(module, modules[module], weights) for module in sorted(modules)}
    for module, name in copies.items():
        _check_copy(module, name, pairs, weights)
    return Contents(pairs, dict(sorted(copies.items())), dict(sorted(whole.items())))


def _files(directory: Path) -> tuple[Path, list[Path]]:
    """The file that messages name, and the files with the tensors."""
    path, index = directory / WEIGHTS, directory / INDEX
    if path.is_file():
        return path, [path]
    present = sorted(each for each in directory.iterdir() if SHARD.fullmatch(each.name))
    if not present:
        refuse_missing_weights(directory)
    match = SHARD.fullmatch(present[0].name)
    count = int(match[2]) if match else 0
    expected = [f"adapter_model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    if index.is_file():
        expected = sorted(_indexed(index))
    missing = [name for name in expected if not (directory / name).is_file()]
    if missing or {each.name for each in present} - {*expected}:
        wrong = missing or sorted({each.name for each in present} - {*expected})
        raise AdapterError(
            f"{directory}: the shard {short(wrong[0])} {'is missing' if missing else 'is extra'}, "
            f"and {len(expected)} belong to the adapter; copy all of one adapter's shards."
        )
    return (index if index.is_file() else present[0]), [directory / name for name in expected]


def _indexed(index: Path) -> set[str]:
    """The shards that an index names; none may lie outside of its folder."""
    try:
        if index.stat().st_size > _LARGEST_INDEX:
            raise AdapterError(f"it has more than the {_LARGEST_INDEX} bytes allowed")
        names = set(parse_json(index.read_bytes())["weight_map"].values())
        if not all(SHARD.fullmatch(name) for name in names):
            raise AdapterError("it names files that are not shards of an adapter")
    except (OSError, ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
        raise AdapterError(
            f"{index} is not a valid index of shards ({short(error)}); save the adapter again."
        ) from error
    return names


def _open(path: Path) -> TensorFile:
    other = other_start(path)
    if other:
        raise AdapterError(f"{path} is not a valid safetensors file: {other}.")
    return open_tensors(path, FLOAT_DTYPES, _LARGEST_HEADER, refuse_changes=True)


def _pair(module: str, embedding: bool, weights: Weights) -> Pair:
    end = "lora_embedding_{}" if embedding else "lora_{}.weight"
    A, B = (f"{PREFIX}{module}.{end.format(factor)}" for factor in "AB")
    for name, other in ((A, B), (B, A)):
        if name not in weights.tensors:
            raise AdapterError(
                f"{weights.path}: {short(other)} is present but {short(name)} is missing; save the "
                f"adapter again with PEFT."
            )
    ranks = weights.tensors[A].shape[0], weights.tensors[B].shape[1]
    if ranks[0] != ranks[1]:
        raise AdapterError(
            f"{weights.path}: {short(A)} is {weights.tensors[A].shape} (rank, in) and {short(B)} "
            f"is {weights.tensors[B].shape} (out, rank): their ranks differ; save the adapter "
            f"again with PEFT."
        )
    return Pair(A, B, embedding)


def _check_tensor(name: str, module: str, tensor: StoredTensor, path: Path) -> None:
    check_module_name(module, f"{path}: {short(name)}: ")
    shape = short(list(tensor.shape))
    if ".base_layer" in f".{module}":
        raise Unsupported(
            f"{path}: {short(name)} is a LoRA of fused expert weights (target_parameters), which "
            f"B @ A of one matrix cannot express; {PLAIN}."
        )
    if len(tensor.shape) == 4:
        raise Unsupported(
            f"{path}: {short(name)} has the shape {shape}: it is a LoRA of a convolution (Conv2d), "
            f"not of a matrix; {PLAIN}."
        )
    if tensor.shape == (0,):
        raise AdapterError(
            f"{path}: {short(name)} has the shape {shape}: DeepSpeed ZeRO-3 had spread the weights "
            f"over its processes when they were saved; set "
            f"stage3_gather_16bit_weights_on_model_save to true and save the adapter again."
        )
    if len(tensor.shape) != 2:
        raise Unsupported(
            f"{path}: {short(name)} has the shape {shape}, and only factors of matrices are read; "
            f"{PLAIN}."
        )


def _check_copy(module: str, name: str, pairs: Mapping[str, Pair], weights: Weights) -> None:
    """Refuse a copy of a base weight that does not fit the factors beside it."""
    if module not in pairs:
        raise unexpected(name, weights.path)
    pair, shape = pairs[module], weights.tensors[name].shape
    out, width = weights.tensors[pair.B].shape[0], weights.tensors[pair.A].shape[1]
    expected = (width, out) if pair.embedding else (out, width)
    if shape != expected:
        raise Unsupported(
            f"{weights.path}: {short(name)} has the shape {short(list(shape))}, and the factors "
            f"beside it are for {short(list(expected))}: the vocabulary was resized, which B @ A "
            f"cannot express; {PLAIN}."
        )


def same_values(one: Tensor, other: Tensor) -> bool:
    """Whether two copies of a weight are equal in the precision of the coarser one."""
    dtypes = sorted((one.dtype, other.dtype), key=lambda dtype: torch.finfo(dtype).bits)
    return torch.equal(one.to(dtypes[0]), other.to(dtypes[0]))
