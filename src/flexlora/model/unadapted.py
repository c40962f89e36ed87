"""What a base model computes with and no adapter changes, in sentences for the user."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn

from flexlora.model.replacement import last, linear_layers, refused_by_peft


def unadapted(model: Any, idle: Collection[str]) -> tuple[str, ...]:
    """Which of a model's weights no adapter changes although all linear layers are to be adapted.

    ``model`` is as it was loaded, and ``idle`` are the paths of the layers that text does not
    reach or that compute more than a product.
    """
    refused, reason = refused_by_peft(model)
    linears = linear_layers(model)
    by_peft = sorted({last(path) for path in linears} & refused)
    notices = [f"Layers named {', '.join(by_peft)} are not adapted: {reason}."] if by_peft else []
    others = [path for path in linears if path in idle and last(path) not in refused]
    if others:
        notices.append(
            f"{_some(others, 'linear layer')} not adapted: not called for text, or more "
            "than a product."
        )
    experts = [
        f"{path}.{name}"
        for path, module in model.named_modules()
        for name, weight in module.named_parameters(recurse=False)
        if weight.dim() > 1 and _holds_experts(path, module)
    ]
    if experts:
        notices.append(
            f"{_some(experts, 'parameter')} not adapted: experts joined in one parameter are not "
            "linear layers."
        )
    return tuple(notices)


def _holds_experts(path: str, module: nn.Module) -> bool:
    """Whether parameters of a module are those of experts, which are not layers of their own."""
    named = "expert" in f"{path} {type(module).__name__}".lower()
    return named and not isinstance(module, nn.Linear)


def _some(paths: list[str], noun: str) -> str:
    """How many there are, and the first of them."""
    if len(paths) == 1:
        return f"The {noun} {paths[0]} is"
    return f"{len(paths)} {noun}s, such as {paths[0]}, are"
