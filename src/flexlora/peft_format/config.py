"""The file ``adapter_config.json``: reading it, and refusing settings beyond a plain LoRA."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from flexlora.errors import AdapterError
from flexlora.peft_format.layouts import CONFIG, is_mlx, mlx, refuse_other_formats
from flexlora.storage.untrusted import parse_json, short

KNOWN_PEFT = (0, 21)
"""The newest version of PEFT whose settings are known here."""

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
    "enable_lora": "only some parts of a fused layer were adapted",
    "use_mora": "MoRA uses a square matrix in place of B @ A",
    "lora_nums": "HydraLoRA routes between several B",
    "use_moslora": "MoSLoRA puts a mixing matrix between B and A",
}
"""Settings that make an adapter more than ``B @ A``, and why; the last are of other programs."""

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

    r: int = Field(default=8, gt=0)
    lora_alpha: float = 8
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    use_rslora: bool | None = None
    base_model_name_or_path: str | None = None
    task_type: str | None = None
    revision: str | None = None


def read_config(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the raw ``adapter_config.json`` of a LoRA adapter.

    Raises:
        AdapterError: the directory or the file is missing, or it is not the JSON of a LoRA
            adapter.
    """
    directory = Path(directory)
    path = directory / CONFIG
    refuse_other_formats(directory)
    if path.stat().st_size > _LARGEST_CONFIG:
        raise AdapterError(
            f"{path} has {path.stat().st_size} bytes, more than the {_LARGEST_CONFIG} allowed; "
            f"save the adapter again with PEFT."
        )
    try:
        data = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise AdapterError(
            f"{path} cannot be read ({error.strerror}); check its permissions and the disk."
        ) from error
    try:
        if data.startswith(b"version https://"):
            raise AdapterError("it is a Git LFS pointer; fetch the file with `git lfs pull`")
        config = parse_json(data)
    except (ValueError, RecursionError) as error:
        raise AdapterError(
            f"{path} is not valid JSON ({short(error)}); save the adapter again with PEFT."
        ) from error
    if not isinstance(config, dict):
        raise AdapterError(
            f"{path} does not contain a JSON object; save the adapter again with PEFT."
        )
    if is_mlx(config):
        raise AdapterError(mlx(directory))
    if config.get("peft_type") != "LORA":
        raise AdapterError(
            f"{path}: peft_type is {short(config.get('peft_type'))}, and only 'LORA' is "
            f"read; convert the adapter to LoRA with PEFT or train a LoRA."
        )
    return config


def refuse_variants(config: Mapping[str, Any], path: Path, allowed: Collection[str] = ()) -> None:
    """Raise ``Unsupported`` if the adapter is more than ``B @ A`` for each module.

    Settings in ``allowed`` are not refused.
    """
    plain = "merge it into its base model with PEFT, or train a plain LoRA"
    for name, reason in _VARIANTS.items():
        if config.get(name) and name not in allowed:
            raise Unsupported(
                f"{path}: {name} is {short(config[name])}: {reason}, which B @ A cannot express; "
                f"{plain}."
            )
    if (config.get("bias") or "none") != "none":
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
    unknown = _unknown(config)
    if unknown and _is_newer(config.get("peft_version")):
        raise Unsupported(
            f"{path}: {short(unknown[0])} is {short(config[unknown[0]])}, a setting of PEFT "
            f"{short(config['peft_version'])}, which is newer than the {KNOWN_PEFT[0]}."
            f"{KNOWN_PEFT[1]} known here, and it may change how the factors are applied; delete it "
            f"if it does not."
        )


def settings_of(config: Mapping[str, Any], path: Path) -> Settings:
    """The settings that decide how the factors are applied.

    What is missing has PEFT's default. Numbers may be written as text or as 8.0, which PEFT itself
    refuses: see ``config_notes``.

    Raises:
        AdapterError: a setting has a value of the wrong type; names the key.
    """
    try:
        return Settings.model_validate(_with_numbers(config))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise AdapterError(
            f"{path}: {short(key)} is {short(first['input'])}: {first['msg'].lower()}; correct it "
            f"or save the adapter again with PEFT."
        ) from error


def config_notes(config: Mapping[str, Any]) -> list[str]:
    """Sentences about settings that are unknown or left out."""
    notes = []
    unknown = _unknown(config)
    if unknown:
        names = ", ".join(short(name) for name in unknown[:5])
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        notes.append(
            f"adapter_config.json has settings that PEFT does not know and ignores: {names}{more}; "
            f"they are ignored here too."
        )
    missing = [name for name in ("r", "lora_alpha") if name not in config]
    if missing:
        notes.append(
            f"adapter_config.json does not give {' and '.join(missing)}; PEFT's default, 8, counts."
        )
    return notes


def not_numbers(config: Mapping[str, Any]) -> list[str]:
    """The settings that are numbers written as text or as 8.0, which PEFT does not take."""
    better = _with_numbers(config)
    return [name for name in config if better[name] is not config[name]]


def _unknown(config: Mapping[str, Any]) -> list[str]:
    return [
        name
        for name, value in config.items()
        if value and name not in _HARMLESS and name not in _VARIANTS
    ]


def _is_newer(version: object) -> bool:
    """Whether a version of PEFT is newer than the one known here."""
    match = re.match(r"(\d{1,6})\.(\d{1,6})", version) if isinstance(version, str) else None
    return match is not None and (int(match[1]), int(match[2])) > KNOWN_PEFT


def _with_numbers(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with the numbers that are written as text, or 8.0, as numbers."""
    better = dict(config)
    for name, kind in (("r", int), ("lora_alpha", float)):
        if name in better:
            better[name] = _number(better[name], kind)
    for name, kind in (("rank_pattern", int), ("alpha_pattern", float)):
        values = better.get(name)
        if isinstance(values, dict):
            numbers = {key: _number(value, kind) for key, value in values.items()}
            if any(numbers[key] is not values[key] for key in values):
                better[name] = numbers
    return better


def _number(value: Any, kind: type[int] | type[float]) -> Any:
    """A number that is written as text or, for a whole number, with a fraction of zero."""
    if isinstance(value, str) and re.fullmatch(r"-?\d{1,9}(\.\d{1,9})?", value.strip()):
        value = float(value) if "." in value or kind is float else int(value)
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    return value
