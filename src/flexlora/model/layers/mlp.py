"""The gated feed-forward block ``down(silu(gate(x)) * up(x))`` as one node of autograd.

It saves its input and the two products, and recomputes the other intermediate values in the
backward pass: half the memory of the block as separate operations, with few passes over the
(rows, inner) tensors.
"""

from __future__ import annotations

from typing import Any, Final, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexlora.model.layers.lora import Linear, LoRALinear

KINDS: Final = ("LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP", "SmolLM3MLP")
"""The classes of transformers that compute this block, if their activation is SiLU."""


def fits(block: nn.Module) -> bool:
    """Whether a block is of a supported class, with SiLU and wrapped plain linear layers."""
    if type(block).__name__ not in KINDS or not _is_silu(getattr(block, "act_fn", None)):
        return False
    layers = [getattr(block, name) for name in ("gate_proj", "up_proj", "down_proj")]
    return all(isinstance(x, LoRALinear) and type(x.base) is nn.Linear for x in layers)


class GatedMLP(nn.Module):
    """The replacement of a block that ``fits``; its layers have the same names."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.gate_proj = cast(LoRALinear, block.gate_proj)
        self.up_proj = cast(LoRALinear, block.up_proj)
        self.down_proj = cast(LoRALinear, block.down_proj)

    def forward(self, x: Tensor) -> Tensor:
        """``down(silu(gate(x)) * up(x))`` with the layers' adapters; x is (..., in)."""
        rows = x.numel() // x.shape[-1]
        layers = tuple(x.linear(rows) for x in (self.gate_proj, self.up_proj, self.down_proj))
        factors = [factor for layer in layers for factor in layer.factors]
        return cast(Tensor, _Gated.apply(x, layers, *factors))  # type: ignore[no-untyped-call]


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layers: tuple[Linear, ...], *factors: Tensor) -> Tensor:
        gate, up, down = layers
        rows = x.reshape(-1, x.shape[-1])
        g, in_gate = gate.forward(rows)
        u, in_up = up.forward(rows)
        y, in_down = down.forward(F.silu(g).mul_(u))
        ctx.save_for_backward(rows, g, u, *in_gate, *in_up, *in_down)
        ctx.layers = layers
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, down = ctx.layers
        rows, g, u, *hidden = ctx.saved_tensors
        a, b = len(gate.adapters), len(gate.adapters) + len(up.adapters)
        in_gate, in_up, in_down = hidden[:a], hidden[a:b], hidden[b:]
        s = F.silu(g)
        d = torch.empty_like(g)
        down_grads = down.backward(grad.reshape(len(rows), -1), s * u, in_down, d)
        du = s.mul_(d)
        dg = torch.ops.aten.silu_backward(d.mul_(u), g)
        dx = torch.empty_like(rows)
        gate_grads = gate.backward(dg, rows, in_gate, dx)
        up_grads = up.backward(du, rows, in_up, dx, add=True)
        return dx.view(*grad.shape[:-1], -1), None, *gate_grads, *up_grads, *down_grads


def _is_silu(activation: Any) -> bool:
    return isinstance(activation, nn.SiLU) or type(activation).__name__ == "SiLUActivation"
