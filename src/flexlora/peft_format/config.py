"""What ``adapter_config.json`` says, and what of it is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from flexlora.errors import AdapterError

CONFIG = "adapter_config.json"


_CONFIG_BYTES = 16 << 20


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


_CHANGES_NOTHING = frozenset(
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
"""Settings that are honoured, or that say nothing about what trained factors mean.

``fan_in_fan_out`` is among them: it tells PEFT that the *base* weight is stored
transposed; ``B`` is (out, rank) and ``A`` (rank, in) either way.
"""


_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
"""Initialisations that leave the base model's weights as they were (PEFT 0.21.2)."""


class Unsupported(AdapterError):
    """A sound PEFT directory whose adapter is not a plain ``B @ A`` for each module."""


class Settings(BaseModel):
    """The part of ``adapter_config.json`` that says what the factors mean."""

    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False)

    r: int = Field(gt=0)
    lora_alpha: float
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    use_rslora: bool = False
    base_model_name_or_path: str | None = None
    task_type: str | None = None
    target_modules: list[str] | str | None = None


def read_config(directory: Path) -> dict[str, Any]:
    """The raw ``adapter_config.json`` of a LoRA adapter.

    Raises:
        AdapterError: the directory or the file is missing, or it is not the JSON of a LoRA
            adapter.
    """
    path = directory / CONFIG
    if not directory.is_dir():
        what = "is a file" if directory.exists() else "does not exist"
        raise AdapterError(f"{directory} {what}; give the folder that holds {CONFIG}.")
    if not path.is_file():
        inner = sorted(child.parent.name for child in directory.glob(f"*/{CONFIG}"))
        hint = f"perhaps {directory / inner[0]}" if inner else f"one that holds {CONFIG}"
        raise AdapterError(f"{path} is missing; give the adapter's own folder, {hint}.")
    if path.stat().st_size > _CONFIG_BYTES:
        raise AdapterError(
            f"{path} has {path.stat().st_size} bytes, more than the {_CONFIG_BYTES} allowed; "
            f"save the adapter again with PEFT."
        )
    try:
        config = parse_json(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(
            f"{path} is not sound JSON ({short(error)}); save the adapter again with PEFT."
        ) from error
    if not isinstance(config, dict):
        raise AdapterError(f"{path} holds no JSON object; save the adapter again with PEFT.")
    if config.get("peft_type") != "LORA":
        raise AdapterError(
            f"{path}: peft_type is {short(config.get('peft_type'))}, and only 'LORA' is "
            f"read; convert the adapter to LoRA with PEFT or train a LoRA."
        )
    return config


def parse_json(data: bytes) -> Any:
    """JSON from strangers: no key twice, no NaN or infinity. Raises AdapterError."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(items)
        if len(found) != len(items):
            names = [name for name, _ in items]
            twice = next(name for name in names if names.count(name) > 1)
            raise AdapterError(f"the key {short(twice)} stands there twice")
        return found

    def constant(name: str) -> float:
        raise AdapterError(f"{name} is not JSON")

    return json.loads(data.decode("utf-8"), object_pairs_hook=pairs, parse_constant=constant)


def refuse_variants(config: Mapping[str, Any], path: Path) -> None:
    """Raise ``Unsupported`` if the adapter is more than ``B @ A`` for each module."""
    plain = "merge it into its base model with PEFT, or train a plain LoRA"
    for name, reason in _VARIANTS.items():
        if config.get(name):
            raise Unsupported(
                f"{path}: {name} is {short(config[name])}: {reason}, which B @ A cannot say; "
                f"{plain}."
            )
    if config.get("bias", "none") != "none":
        raise Unsupported(
            f"{path}: bias is {short(config['bias'])}: biases of the base model were trained "
            f"too, which B @ A cannot say; {plain}."
        )
    init = config.get("init_lora_weights", True)
    init = init.lower() if isinstance(init, str) else init
    # `in` alone would take 1 for True.
    if not any(init is known or (isinstance(known, str) and init == known) for known in _INITS):
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
        if value and name not in _CHANGES_NOTHING:
            raise Unsupported(
                f"{path}: {short(name)} is {short(value)}, a setting unknown here that may "
                f"change what the factors mean; delete it if you know that it does not."
            )


def settings_of(config: Mapping[str, Any], path: Path) -> Settings:
    """The settings that decide what the factors mean; ValueError names the key."""
    try:
        settings = Settings.model_validate(dict(config))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        given = "missing" if first["type"] == "missing" else short(first["input"])
        raise AdapterError(
            f"{path}: {short(place)} is {given}: {first['msg'].lower()}; correct it or save "
            f"the adapter again with PEFT."
        ) from error
    for pattern, rank in (settings.rank_pattern or {}).items():
        if rank <= 0:
            raise AdapterError(
                f"{path}: rank_pattern gives {short(pattern)} the rank {rank}; give it 1 or more."
            )
    return settings


def short(value: object) -> str:
    """An untrusted value made fit for an error message."""
    text = str(value) if isinstance(value, Exception) else repr(value)
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text if len(text) <= 160 else f"{text[:80]}...{text[-60:]}"
