"""The file ``adapter_config.json``: reading it, and refusing settings beyond a plain LoRA."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from flexlora.errors import AdapterError
from flexlora.storage.untrusted import parse_json, short

CONFIG = "adapter_config.json"

_LARGEST_CONFIG = 16 << 20
"""In bytes."""

_VARIANTS = {
    "use_dora": "DoRA also rescales the base weights",
    "use_qalora": "QA-LoRA pools the inputs",
    "use_bdlora": "BD-LoRA stores blocks of the factors",
    "lora_bias": "the adapter adds biases",
    "modules_to_save": "whole modules were trained beside the adapter",
    "trainable_token_indices": "rows of the embedding were trained beside the adapter",
    "target_parameters": "the adapter changes bare parameters, not modules",
    "layer_replication": "the base model's layers are repeated",
    "alora_invocation_tokens": "aLoRA applies to some tokens only",
    "arrow_config": "Arrow routes between several adapters",
    "kasa_config": "KaSA truncates the base weights",
    "monteclora_config": "MonteCLoRA stores a sampler beside the factors",
    "velora_config": "VeLoRA stores projections beside the factors",
    "megatron_config": "Megatron shards the layers",
}
"""Settings that make an adapter more than ``B @ A``, and why."""

_HARMLESS = frozenset(
    {
        *("alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config"),
        *("ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out"),
        *("inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform"),
        *("loftq_config", "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_core"),
        *("merge_weights", "peft_type", "peft_version", "qalora_group_size", "r"),
        *("rank_pattern", "revision", "runtime_config", "target_modules", "task_type"),
        "use_rslora",
    }
)
"""Settings that are honoured, or that do not affect how trained factors are applied.

``fan_in_fan_out`` is among them: it says that the *base* weight is stored transposed; ``B`` is
(out, rank) and ``A`` (rank, in) either way.
"""

_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
"""Initialisations that leave the base model's weights as they were (PEFT 0.21.2)."""


class Unsupported(AdapterError):
    """A valid PEFT directory whose adapter is not a plain ``B @ A`` for each module."""


class Settings(BaseModel):
    """The part of ``adapter_config.json`` that decides how the factors are applied."""

    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False)

    r: int = Field(gt=0)
    lora_alpha: float
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    use_rslora: bool = False
    base_model_name_or_path: str | None = None
    task_type: str | None = None
    target_modules: list[str] | str | None = None


def read_config(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the raw ``adapter_config.json`` of a LoRA adapter.

    Raises:
        AdapterError: the directory or the file is missing, or it is not the JSON of a LoRA
            adapter.
    """
    directory = Path(directory)
    path = directory / CONFIG
    if not directory.is_dir():
        problem = "is a file" if directory.exists() else "does not exist"
        raise AdapterError(f"{directory} {problem}; give the folder that contains {CONFIG}.")
    if not path.is_file():
        raise AdapterError(
            f"{path} is missing; give the adapter's own folder, {_suggestion(directory)}."
        )
    if path.stat().st_size > _LARGEST_CONFIG:
        raise AdapterError(
            f"{path} has {path.stat().st_size} bytes, more than the {_LARGEST_CONFIG} allowed; "
            f"save the adapter again with PEFT."
        )
    try:
        config = parse_json(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(
            f"{path} is not valid JSON ({short(error)}); save the adapter again with PEFT."
        ) from error
    if not isinstance(config, dict):
        raise AdapterError(
            f"{path} does not contain a JSON object; save the adapter again with PEFT."
        )
    if config.get("peft_type") != "LORA":
        raise AdapterError(
            f"{path}: peft_type is {short(config.get('peft_type'))}, and only 'LORA' is "
            f"read; convert the adapter to LoRA with PEFT or train a LoRA."
        )
    return config


def _suggestion(directory: Path) -> str:
    """The likeliest folder of an adapter below ``directory``: the last one of a run, if any."""
    adapters = sorted(
        path.parent
        for pattern in (f"*/{CONFIG}", f"rounds/*/adapter/{CONFIG}")
        for path in directory.glob(pattern)
    )
    return f"perhaps {adapters[-1]}" if adapters else f"one that contains {CONFIG}"


def refuse_variants(config: Mapping[str, Any], path: Path) -> None:
    """Raise ``Unsupported`` if the adapter is more than ``B @ A`` for each module."""
    plain = "merge it into its base model with PEFT, or train a plain LoRA"
    for name, reason in _VARIANTS.items():
        if config.get(name):
            raise Unsupported(
                f"{path}: {name} is {short(config[name])}: {reason}, which B @ A cannot express; "
                f"{plain}."
            )
    if config.get("bias", "none") != "none":
        raise Unsupported(
            f"{path}: bias is {short(config['bias'])}: biases of the base model were trained "
            f"too, which B @ A cannot express; {plain}."
        )
    init = config.get("init_lora_weights", True)
    init = init.lower() if isinstance(init, str) else init
    # `in` would take 1 for True.
    if not any(init is safe or (isinstance(safe, str) and init == safe) for safe in _INITS):
        remedy = (
            "train a LoRA with another init_lora_weights"
            if init == "loftq"
            else "convert it with PEFT, "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )
        raise Unsupported(
            f"{path}: init_lora_weights is {short(init)}, which may change the base model's "
            f"weights, so that the factors do not fit the original; {remedy}."
        )
    for name, value in config.items():
        if value and name not in _HARMLESS:
            raise Unsupported(
                f"{path}: {short(name)} is {short(value)}, an unknown setting that may "
                f"change how the factors are applied; delete it if it does not."
            )


def settings_of(config: Mapping[str, Any], path: Path) -> Settings:
    """The settings that decide how the factors are applied.

    Raises:
        AdapterError: a setting is missing or has a value of the wrong type; names the key.
    """
    try:
        settings = Settings.model_validate(dict(config))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        value = "missing" if first["type"] == "missing" else short(first["input"])
        raise AdapterError(
            f"{path}: {short(key)} is {value}: {first['msg'].lower()}; correct it or save "
            f"the adapter again with PEFT."
        ) from error
    for pattern, rank in (settings.rank_pattern or {}).items():
        if rank <= 0:
            raise AdapterError(
                f"{path}: rank_pattern gives {short(pattern)} the rank {rank}; give it 1 or more."
            )
    return settings
