"""The last decoder layer: after its attention it only computes the positions of the loss.

The feed-forward block of the last layer, and everything after it, is not needed at other
positions.
"""

from __future__ import annotations

from typing import Any, Final, cast

from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from flexlora.model.layers.lora import Layout

KINDS: Final = (
    "LlamaDecoderLayer",
    "MistralDecoderLayer",
    "Qwen2DecoderLayer",
    "Qwen3DecoderLayer",
)
"""The classes of transformers that consist of attention and a feed-forward block, each with a
norm before it and a residual connection."""


def fits(layer: nn.Module) -> bool:
    """Whether a layer is of a supported class."""
    return type(layer).__name__ in KINDS


class LastLayer(GradientCheckpointingLayer):  # type: ignore[no-untyped-call]
    """The replacement of a layer that ``fits``; its modules have the same names."""

    def __init__(self, layer: nn.Module, layout: Layout) -> None:
        super().__init__()
        self.self_attn = cast(nn.Module, layer.self_attn)
        self.mlp = cast(nn.Module, layer.mlp)
        self.input_layernorm = cast(nn.Module, layer.input_layernorm)
        self.post_attention_layernorm = cast(nn.Module, layer.post_attention_layernorm)
        self.layout = layout

    def forward(
        self,
        hidden_states: Tensor,
        output_positions: Tensor | None = None,
        output_edges: tuple[int, ...] | None = None,
        **options: Any,
    ) -> Tensor:
        """The hidden states (1, n, hidden) at the n ``output_positions`` of a row, in order.

        ``hidden_states`` is (1, tokens, hidden); without ``output_positions`` the result has
        all tokens. ``output_edges`` are the bounds of each adapter's output positions, as the
        layout's edges are those of its tokens.
        """
        normed = self.input_layernorm(hidden_states)
        attended, _ = self.self_attn(hidden_states=normed, **options)
        hidden = hidden_states + attended
        if output_positions is None:
            return cast(Tensor, hidden + self.mlp(self.post_attention_layernorm(hidden)))
        hidden = hidden.index_select(1, output_positions)
        with self.layout.of(output_edges):
            return cast(Tensor, hidden + self.mlp(self.post_attention_layernorm(hidden)))
