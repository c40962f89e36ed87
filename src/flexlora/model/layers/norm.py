"""The root-mean-square norm ``w * x / sqrt(mean(x^2) + eps)`` as one node of autograd.

Its weight is frozen, so backward computes only the input's gradient. Sums are in float32 for
every input precision (arXiv 1910.07467, as in transformers' Llama).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, cast

import torch
from torch import Tensor, nn

KINDS: Final = (
    "LlamaRMSNorm",
    "MistralRMSNorm",
    "Qwen2RMSNorm",
    "Qwen3RMSNorm",
    "SmolLM3RMSNorm",
)
"""The classes of transformers that compute this norm."""


def fits(norm: nn.Module) -> bool:
    """Whether a layer is of a supported class."""
    return type(norm).__name__ in KINDS


_BLOCK: Final = 128
"""Rows: half a MiB at 1024 values each, which the second-level caches of processors hold."""


class RMSNorm(nn.Module):
    """The replacement of a norm that ``fits``; the weight (size,) has the same name."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight = cast(nn.Parameter, norm.weight)
        self.eps = float(cast(Any, norm).variance_epsilon)

    def forward(self, x: Tensor) -> Tensor:
        """The norm over the last dimension; x is (..., size), and so is the result."""
        return cast(Tensor, _Normed.apply(x, self.weight, self.eps))  # type: ignore[no-untyped-call]


class _Normed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        norm = torch.linalg.vector_norm(rows, dim=-1, keepdim=True, dtype=torch.float32)
        inverse = norm.square_().div_(rows.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(rows, weight, inverse)
        y = torch.empty_like(rows)
        for block in _blocks(rows):
            y[block] = _wide(rows[block]).mul_(inverse[block])
            y[block] *= weight
        return y.view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        rows, weight, inverse = ctx.saved_tensors
        grads, dx = grad.reshape(rows.shape), torch.empty_like(rows)
        for block in _blocks(rows):
            g, x, scale = _wide(grads[block] * weight), _wide(rows[block]), inverse[block]
            along = (g * x).sum(-1, keepdim=True).mul_(scale.square()).div_(-x.shape[-1])
            dx[block] = x.mul_(along).add_(g).mul_(scale)
        return dx.view(grad.shape), None, None


def _wide(x: Tensor) -> Tensor:
    """A copy in float32 at least: a product of mixed precisions takes four times as long."""
    return x.to(torch.promote_types(x.dtype, torch.float32), copy=True)


def _blocks(rows: Tensor) -> Iterator[slice]:
    """Parts of the rows (n, size) whose intermediate values stay in a processor's cache.

    A GPU takes all in one part.
    """
    size = _BLOCK if rows.device.type == "cpu" else max(len(rows), 1)
    for first in range(0, len(rows), size):
        yield slice(first, first + size)
