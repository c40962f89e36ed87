"""Replacing layers of a transformers model by this library's layers, in place."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Final, cast

from torch import nn
from transformers import conversion_mapping
from transformers.pytorch_utils import Conv1D

from flexlora.errors import ConfigError
from flexlora.model.layers import last_layer, mlp, norm
from flexlora.model.layers.lora import Layout, LoRALinear

_MAMBAS: Final = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")
"""The types of models in which PEFT 0.21 refuses some layers."""

_EXPERTS: Final[Mapping[str, frozenset[str]]] = {
    "qwen2_moe": frozenset(("gate", "gate_proj", "up_proj", "down_proj")),
    "mixtral": frozenset(("gate", "w1", "w2", "w3")),
}
"""The names that PEFT 0.21 takes for parameters of experts, by the pattern that transformers
converts a type of models with."""


def linear_layers(model: nn.Module) -> dict[str, nn.Linear | Conv1D]:
    """The linear layers of a model by module path, without the head."""
    head = cast(Any, model).get_output_embeddings()
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    }


def refused_by_peft(model: nn.Module) -> tuple[frozenset[str], str]:
    """The last names of layers that PEFT does not adapt in a model of this type, and the reason.

    A fused kernel of Mamba reads their weights without calling the layers (PEFT's
    ``_check_lora_target_modules_mamba``). Where transformers 5 has joined the experts' layers into
    parameters, PEFT takes every layer that is called like one of them for these parameters
    (``_convert_peft_config_moe``), and drops what was trained.
    """
    kind = getattr(cast(Any, model).config, "model_type", None)
    if kind in _MAMBAS:
        names = frozenset(("out_proj", "conv1d"))
        return names, f"in models of the type {kind!r} a fused kernel does not call them"
    patterns = getattr(conversion_mapping, "_MODEL_TO_CONVERSION_PATTERN", {})
    names = _EXPERTS.get(patterns.get(kind) or "", frozenset())
    return names, f"in models of the type {kind!r} PEFT takes them for parameters of the experts"


def wrap_linear_layers(
    model: nn.Module,
    targets: Collection[str] | None,
    layout: Layout,
    left_out: Collection[str] = (),
) -> dict[str, LoRALinear]:
    """Wrap the targeted linear layers; returns the wrapped layers by module path.

    ``targets`` are the last parts of module paths, None for every linear layer but the head.
    The paths in ``left_out`` and the layers that PEFT does not adapt are never wrapped.

    Raises:
        ConfigError: no linear layer has one of these names, or PEFT does not adapt it.
    """
    (refused, reason), linears = refused_by_peft(model), linear_layers(model)
    usable = {p: x for p, x in linears.items() if p not in left_out and last(p) not in refused}
    chosen = {p: x for p, x in usable.items() if targets is None or last(p) in targets}
    missing = sorted(set(targets or ()) - set(map(last, chosen)))
    names = ", ".join(sorted(set(map(last, usable))))
    if not usable:
        raise ConfigError(
            "The base model has no linear layer that LoRA can adapt; set model.name to another "
            "model."
        )
    for name in missing:
        if name in refused:
            raise ConfigError(
                f"model.targets names {name!r}, which PEFT would not adapt: {reason}; set "
                f"model.targets to some of {names}."
            )
    if missing or not chosen:
        raise ConfigError(
            f"The model has no linear layer named {', '.join(missing) or 'at all'}; set "
            f"model.targets to some of {names}."
        )
    layers = {}
    for path, linear in chosen.items():
        layers[path] = LoRALinear(linear, layout)
        _replace(model, path, layers[path])
    return layers


def replace_norms_and_mlps(model: nn.Module) -> None:
    """Replace the norms and feed-forward blocks that are of a supported class."""
    for path, module in list(model.named_modules()):
        if norm.fits(module):
            _replace(model, path, norm.RMSNorm(module))
        elif mlp.fits(module):
            _replace(model, path, mlp.GatedMLP(module))


def replace_last_layer(model: nn.Module, layout: Layout) -> bool:
    """Replace the last decoder layer by one that skips positions without loss.

    Returns whether the layer is of a supported class and was replaced.
    """
    layers = getattr(getattr(model, "model", None), "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers) or not last_layer.fits(layers[-1]):
        return False
    layers[-1] = last_layer.LastLayer(layers[-1], layout)
    return True


def last(path: str) -> str:
    """The last part of a module's path."""
    return path.rpartition(".")[2]


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
