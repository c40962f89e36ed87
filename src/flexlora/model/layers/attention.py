"""Attention over a packed row of examples, some of which share their first tokens.

Every token attends to the tokens before it in its own segment and to the whole prefix of that
segment (see ``data.packing.Forest``), as far as the layer's own mask lets it: a sliding window or
chunks are taken from the model. The gradients of all examples flow into their shared prefix; the
results are those of the examples computed one by one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Protocol, TypeVar, cast

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers.masking_utils import causal_mask_function

from flexlora.data import Forest

NAME: Final = "flexlora_segments"
"""The name of this attention in transformers, and of its own kernels in a config."""

KERNELS: Final = (NAME, "sdpa", "eager")
"""The kernels of this attention: its own, or the functions of transformers."""

_CHANGES_SCORES: Final = ("softcap", "s_aux")
"""Options of a layer that only the model's own ``eager`` function computes."""

_Value = TypeVar("_Value")


class UnsupportedAttentionError(Exception):
    """A model's attention does not tell this module what its tokens see."""


def register() -> None:
    """Register the attention and its masks with transformers under its name."""
    transformers.AttentionInterface.register(NAME, attend)
    transformers.AttentionMaskInterface.register(NAME, _rule_of)


@dataclass(frozen=True, eq=False)
class MaskRule:
    """Which earlier tokens of an example a token sees, as the model's layers define it.

    ``function`` is transformers' mask function of a type of layers: causal, a window, chunks. It
    is evaluated at the tokens' positions in their example, not at their places in the row. One
    object serves all layers of its type in one pass.
    """

    function: Callable[..., Tensor]
    device: torch.device
    _made: dict[object, Any] = field(default_factory=dict)

    def visible(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Whether the tokens at positions ``queries`` (n,) see those at ``keys`` (m,): (n, m)."""
        zero = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
        q, k = queries.to(self.device)[:, None], keys.to(self.device)[None]
        visible = self.function(zero, zero, q, k)
        return visible.expand(len(queries), len(keys))

    def is_causal(self, tokens: int) -> bool:
        """Whether each token of an example of ``tokens`` tokens sees all before it."""
        if self.function is cast(Any, causal_mask_function):
            return True
        return self.once(("causal", tokens), lambda: self._is_causal(tokens))

    def blocks(self, forest: Forest) -> tuple[tuple[int, int, Tensor], ...]:
        """The forest's ``blocks`` with what this rule hides taken out of their masks."""

        def make() -> tuple[tuple[int, int, Tensor], ...]:
            blocks = []
            for first, end, mask in forest.blocks:
                at = forest.positions[first:end]
                blocks.append((first, end, mask.to(self.device) & self.visible(at, at)))
            return tuple(blocks)

        return self.once("blocks", make)

    def once(self, key: object, make: Callable[[], _Value]) -> _Value:
        """The value of ``make``, which is called once for each ``key``."""
        if key not in self._made:
            self._made[key] = make()
        return cast(_Value, self._made[key])

    def _is_causal(self, tokens: int) -> bool:
        at = torch.arange(tokens, device=self.device)
        return bool((self.visible(at, at) == (at[None] <= at[:, None])).all())


def _rule_of(
    mask_function: Callable[..., Tensor], device: torch.device | str = "cpu", **options: Any
) -> MaskRule:
    """What transformers calls instead of making a mask."""
    return MaskRule(mask_function, torch.device(device))


@dataclass(frozen=True, eq=False)
class Layer:
    """The attention of one layer in one pass: its rule, its kernel and its options."""

    module: nn.Module
    rule: MaskRule
    scale: float | None
    kernel: str
    options: Mapping[str, Any]

    @property
    def plain(self) -> bool:
        """Whether the scores are plain scaled products, and our own kernels compute them."""
        changed = any(self.options.get(name) is not None for name in _CHANGES_SCORES)
        return self.kernel == NAME and not changed

    def masked(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """Attention under a ``mask`` (tokens, keys), true where a token sees a key.

        ``q`` is (batch, heads, tokens, head size), ``k`` and ``v`` (batch, key heads, keys, head
        size); the result has the shape of ``q``, with the values' head size.
        """
        if self.plain:
            return F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, scale=self.scale, enable_gqa=True
            )
        if self.kernel == "sdpa":
            function, masks = transformers.integrations.sdpa_attention.sdpa_attention_forward, mask
        else:
            function = sys.modules[type(self.module).__module__].eager_attention_forward
            masks = torch.zeros(mask.shape, dtype=q.dtype, device=q.device)
            masks.masked_fill_(~mask, torch.finfo(q.dtype).min)
        scale = q.shape[-1] ** -0.5 if self.scale is None else self.scale
        out: Tensor = function(
            self.module, q, k, v, masks[None, None], dropout=0.0, scaling=scale, **self.options
        )[0]
        return out.transpose(1, 2)


class AttentionPass(Protocol):
    """The attention of one forward pass of the model."""

    def attend(self, layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of one layer.

        q is (batch, heads, tokens, head size), k and v (batch, key heads, tokens, head size);
        the result is (batch, tokens, heads, head size).
        """


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    attention_pass: AttentionPass | None = None,
    kernel: str = NAME,
    **options: Any,
) -> tuple[Tensor, None]:
    """The function that transformers calls in every layer; shapes as ``AttentionPass.attend``.

    Raises:
        UnsupportedAttentionError: the model does not hand on what the pass needs, or has dropout.
    """
    if attention_pass is None or not isinstance(attention_mask, MaskRule) or dropout:
        raise UnsupportedAttentionError(type(module).__name__)
    layer = Layer(module, attention_mask, scaling, kernel, options)
    return attention_pass.attend(layer, query, key, value), None


@dataclass(frozen=True, eq=False)
class PackedPass:
    """A pass over one packed row of examples."""

    forest: Forest

    def attend(self, layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Every example attends to itself; shapes as ``AttentionPass.attend``."""
        forest, rule = self.forest, layer.rule
        if not layer.plain or not rule.is_causal(forest.longest) or q.shape[-1] != v.shape[-1]:
            outputs = [
                layer.masked(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], mask.to(q.device))
                for a, b, mask in rule.blocks(forest)
            ]
            return torch.cat(outputs, dim=2).transpose(1, 2)
        scale = layer.scale or q.shape[-1] ** -0.5
        if q.device.type == "cpu":
            out: Tensor = _OnCPU.apply(q, k, v, forest, scale)  # type: ignore[no-untyped-call]
        else:
            out = masked(q, k, v, forest, scale)
        return out.transpose(1, 2)


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

    The backward pass is in float32 at least: in bfloat16 the kernel takes up to ten
    times as long for segments of a few dozen tokens, conversions included three times as long
    for those of a model's usual rows (torch 2.13).
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
        dtype = grad.dtype
        wide = torch.promote_types(dtype, torch.float32)
        *values, lse = ctx.saved_tensors
        grad, q, k, v, out = (x.to(wide) for x in (grad, *values))
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
        return dq.to(dtype), dk.to(dtype), dv.to(dtype), None, None


def _calls(forest: Forest) -> Iterator[tuple[slice, slice, bool, bool]]:
    """The kernel calls: queries, keys, whether causal, and whether to combine with an earlier
    call of the same queries.
    """
    for tree in forest.trees:
        for first, end in tree:
            yield slice(first, end), slice(first, end), True, False
        if len(tree) > 1:
            yield slice(tree[1][0], tree[-1][1]), slice(*tree[0]), False, True
