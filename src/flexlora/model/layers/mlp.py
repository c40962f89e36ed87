"""The gated feed-forward block ``down(silu(gate(x)) * up(x))`` as one node of autograd.

It keeps its input and the two products, and makes the rest again in the backward pass: half
the memory of the block written out, and no more passes over (rows, inner) than needed.
"""

from __future__ import annotations

from typing import Any, Final, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexlora.model.layers.lora import Linear, LoRALinear

KINDS: Final = ("LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP", "SmolLM3MLP")
"""The classes of transformers that are this block, if their activation is SiLU."""


def fits(block: nn.Module) -> bool:
    """Whether a block is a gated one with SiLU, of plain linear layers with places for factors."""
    if type(block).__name__ not in KINDS or not _is_silu(getattr(block, "act_fn", None)):
        return False
    layers = [getattr(block, name) for name in ("gate_proj", "up_proj", "down_proj")]
    return all(isinstance(x, LoRALinear) and type(x.base) is nn.Linear for x in layers)


class GatedMLP(nn.Module):
    """A block that ``fits``, with its layers under the same names."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.gate_proj = cast(LoRALinear, block.gate_proj)
        self.up_proj = cast(LoRALinear, block.up_proj)
        self.down_proj = cast(LoRALinear, block.down_proj)

    def forward(self, x: Tensor) -> Tensor:
        """``down(silu(gate(x)) * up(x))``."""
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
        a, b = len(gate.parts), len(gate.parts) + len(up.parts)
        in_gate, in_up, in_down = hidden[:a], hidden[a:b], hidden[b:]
        s = F.silu(g)
        d = torch.empty_like(g)
        down_found = down.backward(grad.reshape(len(rows), -1), s * u, in_down, d)
        du = s.mul_(d)
        dg = torch.ops.aten.silu_backward(d.mul_(u), g)
        dx = torch.empty_like(rows)
        gate_found = gate.backward(dg, rows, in_gate, dx)
        up_found = up.backward(du, rows, in_up, dx, add=True)
        return dx.view(*grad.shape[:-1], -1), None, *gate_found, *up_found, *down_found


def _is_silu(activation: Any) -> bool:
    return isinstance(activation, nn.SiLU) or type(activation).__name__ == "SiLUActivation"
