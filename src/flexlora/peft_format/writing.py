"""Writing a PEFT directory in the one form that every consumer reads alike."""

from __future__ import annotations

import json
import re
import secrets
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from flexlora.errors import AdapterError
from flexlora.lowrank import Factors
from flexlora.peft_format.config import CONFIG, short
from flexlora.peft_format.reading import MODULE, MODULE_CHARACTERS, PREFIX, WEIGHTS

CARD = "README.md"


VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM accepts for ``--max-lora-rank``."""


def write(
    adapter: Mapping[str, Factors],
    directory: Path,
    base_model: str | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    task_type: str | None = "CAUSAL_LM",
    rank: int | Literal["max", "vllm"] = "max",
    metadata: Mapping[str, Any] | None = None,
    replace: bool = False,
) -> None:
    """Write an adapter in the one form that PEFT, vLLM, llama.cpp and others read alike.

    All modules get one ``r``, padded with zeros: the largest, or ``rank``, or the next
    that vLLM can be set to. ``lora_alpha = r``, so that the scale is 1; no patterns. The
    same adapter gives the same bytes. The folder appears whole or not at all. ``metadata``
    must be fit for JSON and goes into the model card. Holds the padded copy in memory.

    ``target_modules`` are last names (``q_proj``), or whole paths where a last name would
    also choose a layer that the adapter leaves out.

    Raises:
        AdapterError: the adapter is empty, not finite or of higher rank than ``rank``; a
            name is not a module path; a file cannot be written; ``directory`` is in use
            (``replace=True`` replaces an adapter, and nothing else).
    """
    directory = directory.resolve()
    _refuse_target(directory, replace)
    tensors, common = _padded(adapter, rank, dtype)
    config = _config(list(adapter), common, base_model, task_type)
    card = _card(base_model, task_type, metadata or {})
    partial = directory.parent / f".{directory.name}.{secrets.token_hex(8)}.partial"
    partial.mkdir(parents=True)
    try:
        _write_text(partial / CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")
        _write_text(partial / CARD, card)
        # One entry only: safetensors writes several in no fixed order.
        save_file(tensors, partial / WEIGHTS, metadata={"format": "pt"})
        (partial / WEIGHTS).chmod((partial / CONFIG).stat().st_mode)
        _move(partial, directory)
    except SafetensorError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise AdapterError(
            f"{directory / WEIGHTS} cannot be written ({error}); is the disk full?"
        ) from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _refuse_target(directory: Path, replace: bool) -> None:
    if not directory.exists():
        return
    if not directory.is_dir():
        raise AdapterError(f"{directory} is a file; give the name of a new folder.")
    files = sorted(path.name for path in directory.iterdir())
    if files and not replace:
        raise AdapterError(
            f"{directory} is not empty; give the name of a new folder or ask for the adapter "
            f"there to be replaced."
        )
    foreign = sorted({*files} - {CONFIG, WEIGHTS, CARD})
    if foreign:
        raise AdapterError(
            f"{directory} also holds {short(foreign[0])}, which replacing would delete; give "
            f"the name of a new folder."
        )


def _padded(
    adapter: Mapping[str, Factors], rank: int | str, dtype: torch.dtype
) -> tuple[dict[str, Tensor], int]:
    if not adapter:
        raise AdapterError("The adapter has no modules; give one that has, to write it.")
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise AdapterError(f"Cannot write {dtype}; take torch.float32, bfloat16 or float16.")
    factors = {}
    for module, value in adapter.items():
        if len(module) > MODULE_CHARACTERS or not MODULE.fullmatch(module):
            raise AdapterError(
                f"{short(module)} is no module path; give letters, digits, _ and -, joined "
                f"by dots, at most {MODULE_CHARACTERS} characters."
            )
        factors[module] = value.to("cpu").to(dtype)
        if not all(half.isfinite().all() for half in (factors[module].A, factors[module].B)):
            raise AdapterError(
                f"The factors of {module!r} are not finite in {dtype}; write them in "
                f"torch.float32, or take an earlier state if training diverged."
            )
    common = _common_rank(max(1, *(value.rank for value in factors.values())), rank)
    tensors = {}
    for module, value in factors.items():
        padded = value.padded(common)
        for name, half in (("A", padded.A), ("B", padded.B)):
            # A copy, for safetensors refuses tensors that share memory.
            copy = half.detach().clone(memory_format=torch.contiguous_format)
            tensors[f"{PREFIX}{module}.lora_{name}.weight"] = copy
    return tensors, common


def _common_rank(largest: int, rank: int | str) -> int:
    if rank == "max":
        return largest
    if rank == "vllm":
        allowed = [value for value in VLLM_RANKS if value >= largest]
        if not allowed:
            raise AdapterError(
                f"The adapter has rank {largest}, and vLLM goes up to {VLLM_RANKS[-1]}; "
                f"truncate the adapter first."
            )
        return allowed[0]
    if not isinstance(rank, int) or isinstance(rank, bool):
        raise AdapterError(f"rank is {rank!r}; give a number, 'max' or 'vllm'.")
    if rank < largest:
        raise AdapterError(
            f"The adapter has rank {largest}, above the {rank} asked for; truncate the "
            f"adapter first or ask for {largest}."
        )
    return rank


def _config(
    modules: Sequence[str], rank: int, base_model: str | None, task_type: str | None
) -> dict[str, Any]:
    return {
        "alpha_pattern": {},
        "auto_mapping": None,
        "base_model_name_or_path": base_model,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {},
        "revision": None,
        "target_modules": targets(modules),
        "task_type": task_type,
        "use_dora": False,
        "use_rslora": False,
    }


def targets(modules: Sequence[str]) -> list[str]:
    """PEFT's ``target_modules`` for these modules: last names, or else whole paths.

    Last names do as long as no layer between those adapted goes without: the layers
    numbered 0 to n must each have the same modules. What else the base model has under
    the same last name cannot be known here; PEFT gives it an update of zero.
    """
    layers: dict[str, set[int]] = {}
    for module in modules:
        layer = re.search(r"(?<=\.)\d+(?=\.)", module)
        kind = re.sub(r"(?<=\.)\d+(?=\.)", "*", module, count=1)
        layers.setdefault(kind, set()).update([int(layer[0])] if layer else [])
    numbered = [numbers for numbers in layers.values() if numbers]
    every = set(range(max(map(len, numbered), default=0)))
    if all(numbers == every for numbers in numbered):
        return sorted({module.rpartition(".")[2] for module in modules})
    return sorted(modules)


def _card(base_model: str | None, task_type: str | None, metadata: Mapping[str, Any]) -> str:
    front: dict[str, Any] = {} if base_model is None else {"base_model": base_model}
    front |= {"library_name": "peft", "tags": ["lora"]}
    if task_type == "CAUSAL_LM":
        front["pipeline_tag"] = "text-generation"
    if metadata:
        front["flexlora"] = dict(metadata)
    # JSON is YAML, and quoted as untrusted names need it.
    try:
        lines = [
            f"{name}: {json.dumps(value, ensure_ascii=False, sort_keys=True, allow_nan=False)}"
            for name, value in front.items()
        ]
    except (TypeError, ValueError) as error:
        raise AdapterError(
            f"metadata is not fit for JSON ({short(error)}); give numbers, texts, lists and "
            f"dictionaries."
        ) from error
    for line in lines:
        if not line.isprintable():
            raise AdapterError(f"{short(line)} has characters that cannot be printed; remove them.")
    base = f" for `{base_model}`" if base_model else ""
    return "\n".join(
        [
            "---",
            *lines,
            "---",
            "",
            "# LoRA adapter",
            "",
            f"A LoRA adapter{base} written by flexlora: one rank for all modules, scale 1.",
            "",
        ]
    )


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")


def _move(partial: Path, directory: Path) -> None:
    """Put the finished folder in place, keeping the old one until the new one is there."""
    if not directory.exists():
        partial.rename(directory)
        return
    old = partial.with_suffix(".old")
    directory.rename(old)
    try:
        partial.rename(directory)
    except OSError:
        old.rename(directory)
        raise
    shutil.rmtree(old)
