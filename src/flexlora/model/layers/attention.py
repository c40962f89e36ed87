"""Attention over a row of examples, some of which share their first tokens.

Every token attends to what comes before it in its own segment and to the whole prefix of that
segment (see ``data.packing.Forest``). The gradients of all examples flow into the prefix that
they share; the numbers are those of the examples one by one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from flexlora.data import Forest

NAME = "flexlora_segments"
"""Under which transformers knows this attention."""


def register() -> None:
    """Make the attention known to transformers by its name."""
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
    """Attention by the ``forest`` among the options; without one, transformers' own.

    Tensors are (1, heads, row, head size), the output (1, row, heads, head size).

    Raises:
        ValueError: the model's attention has something that this one has not.
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
        what = unsupported or ("dropout" if dropout else "a sliding window")
        raise ValueError(
            f"This model's attention uses {what}, which the default attention of examples "
            "in one row cannot do; set model.attention to 'eager'."
        )
    scale = scaling or query.shape[-1] ** -0.5
    if query.device.type == "cpu":
        out = _OnCPU.apply(query, key, value, forest, scale)  # type: ignore[no-untyped-call]
    else:
        out = masked(query, key, value, forest, scale)
    return out.transpose(1, 2), None


def masked(query: Tensor, key: Tensor, value: Tensor, forest: Forest, scale: float) -> Tensor:
    """The attention by masks, block by block, on any device."""
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
    """Every segment to itself, and all that continue a prefix to it, by torch's CPU kernel.

    The two parts of a softmax are joined by their log-sum-exp; with the joint output and
    log-sum-exp the kernel's own backward gives each part's gradients exactly (as in ring
    attention, arXiv 2310.01889). No mask, and no product that a mask would throw away.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, forest: Forest, scale: float) -> Tensor:
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3]).transpose(1, 2)
        lse = q.new_empty(q.shape[:3], dtype=torch.float32)
        for queries, keys, causal, joined in _calls(forest):
            part, total = kernel(
                q[:, :, queries], k[:, :, keys], v[:, :, keys], 0.0, causal, scale=scale
            )
            if not joined:
                out[:, :, queries], lse[:, :, queries] = part, total
                continue
            both = torch.logaddexp(lse[:, :, queries], total)
            share = (total - both).exp_()[..., None].to(q.dtype)
            out[:, :, queries].lerp_(part, share)
            lse[:, :, queries] = both
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.forest, ctx.scale = forest, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        q, k, v, out, lse = ctx.saved_tensors
        dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
        for queries, keys, causal, _ in _calls(ctx.forest):
            found = kernel(
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
            for total, part, rows in zip((dq, dk, dv), found, (queries, keys, keys), strict=True):
                total[:, :, rows] += part
        return dq, dk, dv, None, None


def _calls(forest: Forest) -> Iterator[tuple[slice, slice, bool, bool]]:
    """Kernel calls: queries, keys, whether causal, whether to be joined to an earlier one."""
    for tree in forest.trees:
        for first, end in tree:
            yield slice(first, end), slice(first, end), True, False
        if len(tree) > 1:
            yield slice(tree[1][0], tree[-1][1]), slice(*tree[0]), False, True
