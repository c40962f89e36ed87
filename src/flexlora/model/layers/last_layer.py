"""The last decoder layer: after its attention it works where there is loss and nowhere else.

What no loss looks at is not computed: the feed-forward block of the last layer, and all that
comes after it, for the few places that the head is asked for.
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
"""The classes of transformers that are attention, then a feed-forward block, each with a norm
before it and a residual beside it."""


def fits(layer: nn.Module) -> bool:
    """Whether a layer is of a known class."""
    return type(layer).__name__ in KINDS


class LastLayer(GradientCheckpointingLayer):  # type: ignore[no-untyped-call]
    """A layer that ``fits``, with its parts under the same names."""

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
        places: Tensor | None = None,
        place_edges: tuple[int, ...] | None = None,
        **options: Any,
    ) -> Tensor:
        """The hidden states at ``places`` of a row, in their order; without them, at all.

        ``place_edges`` say which places belong to which adapter, as the layout's edges say
        it of tokens.
        """
        normed = self.input_layernorm(hidden_states)
        attended, _ = self.self_attn(hidden_states=normed, **options)
        hidden = hidden_states + attended
        if places is None:
            return cast(Tensor, hidden + self.mlp(self.post_attention_layernorm(hidden)))
        hidden = hidden.index_select(1, places)
        with self.layout.of(place_edges):
            return cast(Tensor, hidden + self.mlp(self.post_attention_layernorm(hidden)))
