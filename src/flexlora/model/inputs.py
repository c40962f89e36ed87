"""The inputs of a model for one row of tokens, beside the tokens: the bounds of its examples,
and at which positions logits are needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flexlora.data import Forest, Pack


def flash_inputs(forest: Forest, device: torch.device) -> dict[str, Any]:
    """The keyword arguments that tell transformers' flash attention the bounds of the examples.

    ``forest`` has no shared prefixes; the bounds are (examples + 1,) in int32.
    """
    bounds = torch.tensor(forest.edges, dtype=torch.int32, device=device)
    return {
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": forest.longest,
        "max_length_k": forest.longest,
    }


def longest_alike(config: Any) -> float:
    """The length up to which an example's positions do not depend on its row; else infinite.

    Rotary embeddings of the types ``dynamic`` and ``longrope`` are computed from the largest
    position of the whole batch once it exceeds the length that the model was first trained with.
    """
    text = config.get_text_config()
    lengths = []
    for rope in _ropes(getattr(text, "rope_parameters", None)):
        if rope["rope_type"] == "dynamic":
            lengths.append(text.max_position_embeddings)
        elif rope["rope_type"] == "longrope":
            lengths.append(rope["original_max_position_embeddings"])
    return min(lengths, default=float("inf"))


def _ropes(parameters: Any) -> list[Any]:
    """The settings of the rotary embeddings: one for all layers, or one by type of layers."""
    if not isinstance(parameters, dict):
        return []
    nested = [each for each in parameters.values() if isinstance(each, dict)]
    return [each for each in (parameters, *nested) if "rope_type" in each]


def output_inputs(
    row: Pack, edges: Sequence[int] | None, device: torch.device, ends_early: bool
) -> dict[str, Any]:
    """The keyword arguments that tell the model at which positions logits are needed.

    If the last layer ``ends_early`` (see ``layers.last_layer``), it gets the n different
    positions of the loss, and the head repeats them for ``row.loss_positions``. ``edges`` are
    the bounds of the adapters' tokens.
    """
    if not ends_early:
        return {"logits_to_keep": to_device(row.loss_positions, device)}
    positions, order = torch.unique(row.loss_positions, return_inverse=True)
    bounds = None if edges is None else torch.searchsorted(positions, torch.tensor(edges))
    return {
        "output_positions": to_device(positions, device),
        "output_edges": None if bounds is None else tuple(bounds.tolist()),
        "logits_to_keep": to_device(order, device),
    }


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """The tensor on ``device``; a copy to a CUDA device is asynchronous."""
    if device.type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)
