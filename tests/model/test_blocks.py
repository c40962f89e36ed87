import pytest
import torch

from flexlora.model.blocks import kind
from flexlora.model.replacement import linear_layers
from support import families

ATTENTION, FEED_FORWARD = "attention", "feed_forward"
PATHS = {
    "model.layers.0.self_attn.q_proj": ATTENTION,
    "model.layers.0.mlp.up_proj": FEED_FORWARD,
    "model.decoder.layers.0.fc1": FEED_FORWARD,
    "model.decoder.layers.0.fc2": FEED_FORWARD,
    "model.decoder.layers.0.self_attn.out_proj": ATTENTION,
    "encoder.block.0.layer.0.SelfAttention.q": ATTENTION,
    "decoder.block.3.layer.2.DenseReluDense.wi_0": FEED_FORWARD,
    "decoder.block.3.layer.2.DenseReluDense.wo": FEED_FORWARD,
    "gpt_neox.layers.1.attention.query_key_value": ATTENTION,
    "gpt_neox.layers.1.mlp.dense_h_to_4h": FEED_FORWARD,
    "transformer.h.0.attn.c_proj": ATTENTION,
    "transformer.h.0.mlp.c_proj": FEED_FORWARD,
    "transformer.h.0.mlp.c_fc": FEED_FORWARD,
    "transformer.h.0.self_attention.dense": ATTENTION,
    "transformer.blocks.0.norm_attn_norm.attn.Wqkv": ATTENTION,
    "transformer.blocks.0.ffn.up_proj": FEED_FORWARD,
    "model.layers.0.block_sparse_moe.input_linear": FEED_FORWARD,
    "model.layers.0.mlp.shared_experts.down_proj": FEED_FORWARD,
    "model.layers.2.temporal_block.linear_x": ATTENTION,
    "model.layers.2.mlp_block.gate_proj": FEED_FORWARD,
    "backbone.layers.0.mixer.in_proj": ATTENTION,
    "backbone.layers.1.mixer.down_proj": FEED_FORWARD,
    "model.layers.0.conv.out_proj": ATTENTION,
    "rwkv.blocks.0.attention.receptance": ATTENTION,
    "rwkv.blocks.0.feed_forward.key": FEED_FORWARD,
}


@pytest.mark.parametrize(("path", "block"), PATHS.items())
def test_the_block_of_a_layer_is_known(path, block):
    assert kind(path) == block


@pytest.mark.parametrize("path", ["odd.name", "model.layers.0.linear"])
def test_a_layer_of_an_unknown_name_has_none(path):
    with pytest.raises(ValueError, match="is neither in an attention nor in a feed-forward"):
        kind(path)


@pytest.mark.parametrize("family", {**families.PACKED, **families.SINGLE})
def test_every_linear_layer_of_every_family_has_a_block(family):
    with torch.device("meta"):
        model = families.build(family, {**families.PACKED, **families.SINGLE}[family], fill=False)
    # What joins Zamba's shared block to a layer belongs to neither of its parts.
    layers = [path for path in linear_layers(model) if not path.endswith(".linear")]
    assert {kind(path) for path in layers} <= {ATTENTION, FEED_FORWARD}
    assert ATTENTION in map(kind, layers)
