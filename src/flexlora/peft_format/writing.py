"""Writing a PEFT directory with one rank and scaling 1, which every program interprets alike."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from flexlora.errors import AdapterError
from flexlora.lowrank import Factors
from flexlora.peft_format.layouts import CONFIG, WEIGHTS
from flexlora.peft_format.names import PREFIX, check_module_name
from flexlora.storage.untrusted import short

CARD = "README.md"
"""The model card."""

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM accepts for ``--max-lora-rank``."""


def write(
    adapter: Mapping[str, Factors],
    directory: str | os.PathLike[str],
    base_model: str | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    task_type: str | None = None,
    target_modules: Sequence[str] | None = None,
    embeddings: Collection[str] = (),
    whole: Mapping[str, Tensor] | None = None,
    settings: Mapping[str, Any] | None = None,
    rank: int | Literal["max", "vllm"] = "max",
    metadata: Mapping[str, Any] | None = None,
    replace: bool = False,
) -> None:
    """Write a standard adapter that PEFT, vLLM, llama.cpp and others interpret identically.

    All modules are padded with zeros to one ``r``: the largest rank (``max``), ``rank``, or the
    next one that vLLM supports (``vllm``). ``lora_alpha`` is ``r``, so that the scaling is 1,
    and there are no patterns. The same adapter gives the same bytes. The folder appears whole
    or not at all. ``metadata`` must be valid JSON and goes into the model card. Needs memory
    for the padded copy.

    ``target_modules`` are the modules' whole paths, unless others are given: see ``targets`` and
    ``common_targets``. ``embeddings`` are the modules that are embeddings, whose update ``B @ A``
    is (width, vocabulary). ``whole`` are tensors of modules that were trained as a whole, by the
    path of the parameter; ``settings["modules_to_save"]`` must name the modules. ``settings``
    are further entries of ``adapter_config.json``.

    Raises:
        AdapterError: the adapter is empty, not finite or of a higher rank than ``rank``; a
            name is not a module path; a file cannot be written; ``directory`` is in use
            (``replace=True`` replaces an adapter, and nothing else).
    """
    directory = Path(directory).resolve()
    check_target(directory, replace)
    tensors, common = _padded(adapter, rank, dtype, embeddings)
    for path, value in (whole or {}).items():
        tensors[f"{PREFIX}{path}"] = _finite(value.to("cpu", dtype).contiguous(), path, dtype)
    config = _config(common, base_model, task_type) | dict(settings or {})
    config["target_modules"] = sorted(target_modules or adapter)
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


def check_target(directory: Path, replace: bool) -> None:
    """Refuse a folder to write to that is in use.

    Raises:
        AdapterError: it is a file, or a folder that is not empty, or, with ``replace``, one
            with other files than an adapter's.
    """
    if not directory.exists():
        return
    if not directory.is_dir():
        raise AdapterError(f"{directory} is a file; give the name of a new folder.")
    files = sorted(path.name for path in directory.iterdir())
    if files and not replace:
        raise AdapterError(
            f"{directory} is not empty; give the name of a new folder, or replace the adapter "
            f"in it with --overwrite (from Python: replace=True)."
        )
    foreign = sorted({*files} - {CONFIG, WEIGHTS, CARD})
    if foreign:
        raise AdapterError(
            f"{directory} also contains {short(foreign[0])}, which replacing the adapter would "
            f"delete; give the name of a new folder."
        )


def _padded(
    adapter: Mapping[str, Factors],
    rank: int | str,
    dtype: torch.dtype,
    embeddings: Collection[str],
) -> tuple[dict[str, Tensor], int]:
    if not adapter:
        raise AdapterError("The adapter has no modules; give one with at least one module.")
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise AdapterError(f"Cannot write {dtype}; use torch.float32, bfloat16 or float16.")
    factors = {}
    for module, value in adapter.items():
        check_module_name(module)
        factors[module] = value.to("cpu").to(dtype)
        for factor in (factors[module].A, factors[module].B):
            _finite(factor, module, dtype)
    common = _common_rank(max(1, *(value.rank for value in factors.values())), rank)
    tensors = {}
    for module, value in factors.items():
        padded = value.padded(common)
        for name, factor in (("A", padded.A), ("B", padded.B)):
            # A copy, because safetensors refuses tensors that share memory.
            copy = factor.detach().clone(memory_format=torch.contiguous_format)
            end = f"lora_embedding_{name}" if module in embeddings else f"lora_{name}.weight"
            tensors[f"{PREFIX}{module}.{end}"] = copy
    return tensors, common


def _finite(value: Tensor, name: str, dtype: torch.dtype) -> Tensor:
    if not value.isfinite().all():
        raise AdapterError(
            f"The factors of {name!r} are not finite in {dtype}; write them in torch.float32, or "
            f"use an earlier checkpoint if training diverged."
        )
    return value


def _common_rank(largest: int, rank: int | str) -> int:
    if rank == "max":
        return largest
    if rank == "vllm":
        allowed = [value for value in VLLM_RANKS if value >= largest]
        if not allowed:
            raise AdapterError(
                f"The adapter has rank {largest}, and vLLM supports up to {VLLM_RANKS[-1]}; "
                f"truncate the adapter first."
            )
        return allowed[0]
    if not isinstance(rank, int) or isinstance(rank, bool):
        raise AdapterError(f"rank is {rank!r}; give a number, 'max' or 'vllm'.")
    if rank < largest:
        raise AdapterError(
            f"The adapter has rank {largest}, above the requested {rank}; truncate the "
            f"adapter first or write it with rank {largest}."
        )
    return rank


def _config(rank: int, base_model: str | None, task_type: str | None) -> dict[str, Any]:
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
        "task_type": task_type,
        "use_dora": False,
        "use_rslora": False,
    }


def _card(base_model: str | None, task_type: str | None, metadata: Mapping[str, Any]) -> str:
    front: dict[str, Any] = {} if base_model is None else {"base_model": base_model}
    front |= {"library_name": "peft", "tags": ["lora"]}
    if task_type == "CAUSAL_LM":
        front["pipeline_tag"] = "text-generation"
    if metadata:
        front["flexlora"] = dict(metadata)
    # JSON is valid YAML, and its quotes protect against untrusted names.
    try:
        lines = [
            f"{name}: {json.dumps(value, ensure_ascii=False, sort_keys=True, allow_nan=False)}"
            for name, value in front.items()
        ]
    except (TypeError, ValueError) as error:
        raise AdapterError(
            f"metadata is not valid JSON ({short(error)}); give numbers, strings, lists and "
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
