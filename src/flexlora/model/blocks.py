"""Which block of a transformer a module belongs to."""

from __future__ import annotations

import re
from typing import Final

from flexlora.errors import ConfigError

_ATTENTION_BLOCKS: Final = re.compile(
    r"attn|attention|mamba|temporal_block|time_mix|recurrent|short_conv|^conv$|^ssm$"
)
_FEED_FORWARD_BLOCKS: Final = re.compile(
    r"mlp|ffn|feed_?forward|expert|moe|densereludense|channel_mix|^ff$"
)
"""Names of blocks, of which the innermost counts; other mixers of tokens stand for attention."""

_ATTENTION_LAYERS: Final = frozenset(
    (
        *("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "out_proj", "query_key_value"),
        *("query", "key", "value", "qkv", "wqkv", "c_attn", "in_proj", "x_proj", "dt_proj"),
        *("q", "k", "v", "o", "wq", "wk", "wv", "attn_out"),
    )
)
_FEED_FORWARD_LAYERS: Final = frozenset(
    (
        *("fc1", "fc2", "fc_in", "fc_out", "c_fc", "wi", "wi_0", "wi_1", "wo", "w1", "w2", "w3"),
        *("gate_proj", "up_proj", "down_proj", "gate_up_proj", "dense_h_to_4h", "dense_4h_to_h"),
        *("ff_proj", "ff_out", "lin1", "lin2", "linear1", "linear2"),
    )
)
"""Names of layers that stand in a decoder layer without a block of their own, as in OPT."""


def kind(module: str) -> str:
    """The block of a module, from its path: ``attention`` or ``feed_forward``.

    Layers that mix tokens without attention, such as those of Mamba, count as attention.

    Raises:
        ConfigError: neither the names of its blocks nor its own tell.
    """
    *blocks, layer = module.lower().split(".")
    for block in reversed(blocks):
        if _FEED_FORWARD_BLOCKS.search(block):
            return "feed_forward"
        if _ATTENTION_BLOCKS.search(block):
            return "attention"
    if layer in _FEED_FORWARD_LAYERS:
        return "feed_forward"
    if layer in _ATTENTION_LAYERS:
        return "attention"
    raise ConfigError(
        f"Module {module!r} is neither in an attention nor in a feed-forward block, so its rank "
        "is not defined by a rank type with different ranks for the two. Use rank types with "
        "equal ranks, or leave the module out of model.targets."
    )
