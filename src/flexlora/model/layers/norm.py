"""The root-mean-square norm ``w * x / sqrt(mean(x^2) + eps)`` as one node of autograd.

Its weight is frozen, so backward computes only the input's gradient. Sums are in float32 for
every input precision (arXiv 1910.07467, as in transformers' Llama).
"""

from __future__ import annotations

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
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        inverse = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return cast(Tensor, (x * inverse).to(x.dtype).mul_(weight))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        x, weight, inverse = ctx.saved_tensors
        g = (grad * weight).float()
        along = torch.linalg.vecdot(g, x.float(), dim=-1)[..., None]
        along = along.mul_(inverse.square()).div_(-x.shape[-1])
        return g.addcmul_(x, along).mul_(inverse).to(x.dtype), None, None
