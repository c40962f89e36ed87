"""The file ``adapter_model.safetensors``: finding it, and pairing its tensors by module."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from flexlora.errors import AdapterError
from flexlora.peft_format.config import Unsupported
from flexlora.storage.tensors import FLOAT_DTYPES, StoredTensor, TensorFile, open_tensors
from flexlora.storage.untrusted import short

WEIGHTS = "adapter_model.safetensors"

PREFIX = "base_model.model."
"""What PEFT puts before the path of every module."""

MODULE = re.compile(r"[A-Za-z0-9_\-]+(\.[A-Za-z0-9_\-]+)*")

MODULE_CHARACTERS = 512

_TENSOR = re.compile(rf"{re.escape(PREFIX)}(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")

_LARGEST_HEADER = 32 << 20

_PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth", "adapter_model.pkl")

_CONVERT = (
    "convert it with PEFT on a machine that you trust, "
    "save_pretrained(..., safe_serialization=True)"
)

_PLAIN = "merge it into its base model with PEFT, or train a plain LoRA"


def open_weights(directory: Path) -> TensorFile:
    """Open an adapter's tensors after a check of their header; nothing is ever unpickled.

    Raises:
        AdapterError: the file is missing, of another format, damaged or empty, or its dtypes
            are not floats.
    """
    path = directory / WEIGHTS
    if not path.is_file():
        _refuse_missing(directory)
    _refuse_other_formats(path)
    file = open_tensors(path, FLOAT_DTYPES, _LARGEST_HEADER, refuse_changes=True)
    if not file.tensors:
        raise AdapterError(f"{path} contains no tensors; save the trained adapter again with PEFT.")
    return file


def factor_pairs(file: TensorFile) -> dict[str, tuple[StoredTensor, StoredTensor]]:
    """``A`` (rank, in) and ``B`` (out, rank) of each module, sorted by the modules' names.

    Raises:
        Unsupported: a tensor belongs to an adapter that is more than ``B @ A``.
        AdapterError: a tensor has another name or shape, or is missing, or ranks differ.
    """
    for tensor in file.tensors.values():
        _check_tensor(tensor, file.path)
    pairs = {}
    modules = {name[len(PREFIX) : -len(".lora_A.weight")] for name in file.tensors}
    for module in sorted(modules):
        A, B = _pair(module, file.tensors, file.path)
        if A.shape[0] != B.shape[1]:
            raise AdapterError(
                f"{file.path}: {short(A.name)} is {A.shape} (rank, in) and {short(B.name)} is "
                f"{B.shape} (out, rank): their ranks differ; save the adapter again with PEFT."
            )
        pairs[module] = A, B
    return pairs


def check_module_name(module: str, place: str = "") -> None:
    """Refuse a name that is not a module path, such as ``model.layers.0.self_attn.q_proj``.

    Raises:
        AdapterError: with ``place`` before the name.
    """
    if len(module) > MODULE_CHARACTERS or not MODULE.fullmatch(module):
        raise AdapterError(
            f"{place}{short(module)} is not a module path; use letters, digits, _ and -, joined "
            f"by dots, at most {MODULE_CHARACTERS} characters."
        )


def _pair(
    module: str, tensors: Mapping[str, StoredTensor], path: Path
) -> tuple[StoredTensor, StoredTensor]:
    A, B = (f"{PREFIX}{module}.lora_{factor}.weight" for factor in "AB")
    for name, other in ((A, B), (B, A)):
        if name not in tensors:
            raise AdapterError(
                f"{path}: {short(other)} is present but {short(name)} is missing; save the "
                f"adapter again with PEFT."
            )
    return tensors[A], tensors[B]


def _check_tensor(tensor: StoredTensor, path: Path) -> None:
    match = _TENSOR.fullmatch(tensor.name)
    if not match:
        raise _unexpected(tensor.name, path)
    check_module_name(match["module"], f"{path}: {short(tensor.name)}: ")
    if len(tensor.shape) != 2 or 0 in tensor.shape:
        raise AdapterError(
            f"{path}: {short(tensor.name)} has the shape {short(list(tensor.shape))}, and only "
            f"matrices that are not empty are read; save a linear layer's adapter, with "
            f"gathered weights."
        )


def _unexpected(name: str, path: Path) -> AdapterError:
    """Why a tensor that is not a factor of a linear layer is refused."""
    other_adapter = re.search(r"\.lora_[AB]\.([^.]+)\.weight$", name)
    if "lora_magnitude_vector" in name:
        return Unsupported(f"{path}: {short(name)} belongs to DoRA, not to B @ A; {_PLAIN}.")
    if "lora_embedding_" in name:
        return Unsupported(f"{path}: {short(name)} adapts an embedding, not a matrix; {_PLAIN}.")
    if name.endswith(".bias"):
        return Unsupported(f"{path}: {short(name)} is a trained bias, not B @ A; {_PLAIN}.")
    if name.startswith(PREFIX) and other_adapter:
        return AdapterError(
            f"{path}: {short(name)} carries the adapter name {short(other_adapter[1])}, as in "
            f"memory; save it with PEFT's save_pretrained, which leaves the name out."
        )
    if name.startswith(PREFIX) and ".lora_" not in name:
        return Unsupported(
            f"{path}: {short(name)} is a whole tensor (modules_to_save, or a resized "
            f"embedding), not B @ A; {_PLAIN}."
        )
    return AdapterError(
        f"{path}: {short(name)} is not of the form {PREFIX}MODULE.lora_A.weight (or lora_B) "
        f"that PEFT writes; save the adapter with PEFT."
    )


def _refuse_missing(directory: Path) -> None:
    pickles = [name for name in _PICKLES if (directory / name).exists()]
    if pickles:
        raise AdapterError(
            f"{directory / pickles[0]} is a pickle, which can run any program when loaded, "
            f"and is not read; {_CONVERT}."
        )
    raise AdapterError(f"{directory / WEIGHTS} is missing; save the adapter again with PEFT.")


def _refuse_other_formats(path: Path) -> None:
    """Refuse what is not safetensors by its first bytes, with the remedy for its format."""
    try:
        with path.open("rb") as file:
            start = file.read(16)
    except OSError as error:
        raise AdapterError(
            f"{path} cannot be read ({error.strerror}); check its permissions and the disk."
        ) from error
    if len(start) < 16 or start[8:9] != b"{":
        raise AdapterError(f"{path} is not a valid safetensors file: {_format(start)}.")


def _format(start: bytes) -> str:
    """What a file that begins with these bytes is, and what to do about it."""
    if start.startswith(b"PK\x03\x04"):
        return f"it is a zip, as PyTorch's pickles are, and is not read; {_CONVERT}"
    if start[:1] == b"\x80" and start[1:2] in b"\x02\x03\x04\x05":
        return f"it is a pickle, and is not read; {_CONVERT}"
    if start.startswith(b"version https://"):
        return "it is a Git LFS pointer; fetch the file itself with `git lfs pull`"
    if start.startswith(b"GGUF"):
        return "it is a GGUF file; give the PEFT adapter from which it was made"
    if len(start) < 16:
        return f"it was cut off at {len(start)} bytes; copy it again"
    return "it has another format; save the adapter again with PEFT"
