"""The inputs of a model for one row of tokens, beside the tokens: what attends to what, and
at which positions logits are needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flexlora.data import Forest, Pack
from flexlora.errors import ConfigError
from flexlora.model.layers import attention


def shares_prefixes(implementation: str) -> bool:
    """Whether this attention implementation supports examples that share their first tokens."""
    return implementation in (attention.NAME, "sdpa", "eager")


def attention_inputs(
    forest: Forest, implementation: str, dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """The keyword arguments that tell the model's attention which tokens see which.

    For ``sdpa`` and ``eager`` an additive mask (1, 1, tokens, tokens) in ``dtype``; for flash
    attention the bounds of the examples, (examples + 1,) in int32.

    Raises:
        ConfigError: examples share tokens, but the implementation does not support that.
    """
    if implementation == attention.NAME:
        # Our attention uses the forest instead of a mask; transformers passes a 4-D one on as is.
        return {"attention_mask": torch.empty(1, 1, 0, 0), "forest": forest}
    if shares_prefixes(implementation):
        visible = forest.mask(0, forest.edges[-1]).to(device)
        mask = torch.zeros(visible.shape, dtype=dtype, device=device)
        mask.masked_fill_(~visible, torch.finfo(dtype).min)
        return {"attention_mask": mask[None, None]}
    if any(prefix >= 0 for prefix in forest.prefixes):
        raise ConfigError(
            f"model.attention {implementation!r} cannot share first tokens of examples; set "
            f"model.attention to {attention.NAME!r}, 'sdpa' or 'eager'."
        )
    bounds = torch.tensor(forest.edges, dtype=torch.int32, device=device)
    longest = forest.longest
    return {
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
        "max_length_k": longest,
    }


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
