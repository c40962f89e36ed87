"""Replacing layers of a transformers model by this library's layers, in place."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, cast

from torch import nn

from flexlora.errors import ConfigError
from flexlora.model.layers import last_layer, mlp, norm
from flexlora.model.layers.lora import Layout, LoRALinear


def wrap_linear_layers(
    model: nn.Module, targets: Collection[str] | None, layout: Layout
) -> dict[str, LoRALinear]:
    """Wrap the targeted linear layers; returns the wrapped layers by module path.

    ``targets`` are the last parts of module paths, None for every linear layer but the head.

    Raises:
        ConfigError: no linear layer has one of these names.
    """
    head = cast(Any, model).get_output_embeddings()
    linears = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module is not head
        and (targets is None or path.rsplit(".", 1)[-1] in targets)
    }
    missing = set(targets or ()) - {path.rsplit(".", 1)[-1] for path in linears}
    if missing or not linears:
        names = sorted(
            {
                path.rsplit(".", 1)[-1]
                for path, module in model.named_modules()
                if isinstance(module, nn.Linear) and module is not head
            }
        )
        raise ConfigError(
            f"The model has no linear layer named {', '.join(sorted(missing)) or 'at all'}; set "
            f"model.targets to some of {', '.join(names)}."
        )
    layers = {}
    for path, linear in linears.items():
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


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
