"""Attention over a packed row of examples, some of which share their first tokens.

Every token attends to the tokens before it in its own segment and to the whole prefix of that
segment (see ``data.packing.Forest``). The gradients of all examples flow into their shared
prefix; the results are those of the examples computed one by one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from flexlora.data import Forest
from flexlora.errors import ConfigError

NAME = "flexlora_segments"
"""The name of this attention in transformers."""


def register() -> None:
    """Register the attention with transformers under its name."""
    transformers.AttentionInterface.register(NAME, attend)
    transformers.AttentionMaskInterface.register(NAME, transformers.masking_utils.sdpa_mask)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention by the ``forest`` in the options; without one, transformers' SDPA.

    ``query`` is (1, heads, tokens, head size); ``key`` and ``value`` are (1, key heads, tokens,
    head size), with heads a multiple of key heads. ``attention_mask`` is ignored if there is a
    forest. The output is (1, tokens, heads, head size); attention weights are not returned.

    Raises:
        ConfigError: the model's attention has dropout, capped scores, sinks or a sliding window
            shorter than an example.
    """
    forest: Forest | None = options.pop("forest", None)
    if forest is None:
        sdpa = transformers.integrations.sdpa_attention.sdpa_attention_forward
        return sdpa(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            **options,
        )
    window = options.get("sliding_window")
    unsupported = [name for name in ("softcap", "s_aux") if options.get(name) is not None]
    if unsupported or dropout or (window and forest.longest > window):
        feature = ", ".join(unsupported) or ("dropout" if dropout else "a sliding window")
        raise ConfigError(
            f"This model's attention uses {feature}, which the default attention of packed "
            "examples does not support; set model.attention to 'eager'."
        )
    scale = scaling or query.shape[-1] ** -0.5
    if query.device.type == "cpu":
        out = _OnCPU.apply(query, key, value, forest, scale)  # type: ignore[no-untyped-call]
    else:
        out = masked(query, key, value, forest, scale)
    return out.transpose(1, 2), None


def masked(query: Tensor, key: Tensor, value: Tensor, forest: Forest, scale: float) -> Tensor:
    """The attention of the forest by masks, block by block, on any device.

    Shapes are those of ``attend``; the output is (1, heads, tokens, head size).
    """
    outputs = [
        F.scaled_dot_product_attention(
            query[:, :, first:end],
            key[:, :, first:end],
            value[:, :, first:end],
            attn_mask=mask.to(query.device),
            scale=scale,
            enable_gqa=True,
        )
        for first, end, mask in forest.blocks
    ]
    return torch.cat(outputs, dim=2)


class _OnCPU(torch.autograd.Function):
    """The attention of the forest by torch's CPU flash kernel, without masks.

    One call for each segment with itself, and one for all segments of a tree with their prefix.
    The two partial softmaxes are combined by their log-sum-exp; with the combined output and
    log-sum-exp the kernel's own backward gives the gradients of each call exactly (as in ring
    attention, arXiv 2310.01889). Shapes are those of ``masked``.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, forest: Forest, scale: float) -> Tensor:
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3]).transpose(1, 2)
        lse = q.new_empty(q.shape[:3], dtype=torch.float32)
        for queries, keys, causal, combined in _calls(forest):
            part, part_lse = kernel(
                q[:, :, queries], k[:, :, keys], v[:, :, keys], 0.0, causal, scale=scale
            )
            if not combined:
                out[:, :, queries], lse[:, :, queries] = part, part_lse
                continue
            total_lse = torch.logaddexp(lse[:, :, queries], part_lse)
            share = (part_lse - total_lse).exp_()[..., None].to(q.dtype)
            out[:, :, queries].lerp_(part, share)
            lse[:, :, queries] = total_lse
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.forest, ctx.scale = forest, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        q, k, v, out, lse = ctx.saved_tensors
        dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
        for queries, keys, causal, _ in _calls(ctx.forest):
            grads = kernel(
                grad[:, :, queries],
                q[:, :, queries],
                k[:, :, keys],
                v[:, :, keys],
                out[:, :, queries],
                lse[:, :, queries],
                0.0,
                causal,
                scale=ctx.scale,
            )
            for total, part, rows in zip((dq, dk, dv), grads, (queries, keys, keys), strict=True):
                total[:, :, rows] += part
        return dq, dk, dv, None, None


def _calls(forest: Forest) -> Iterator[tuple[slice, slice, bool, bool]]:
    """The kernel calls: queries, keys, whether causal, and whether to combine with an earlier
    call of the same queries.
    """
    for tree in forest.trees:
        for first, end in tree:
            yield slice(first, end), slice(first, end), True, False
        if len(tree) > 1:
            yield slice(tree[1][0], tree[-1][1]), slice(*tree[0]), False, True
