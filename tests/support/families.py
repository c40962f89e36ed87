"""Tiny random models of many families, each with the traits that make its rows special."""

from collections.abc import Mapping
from typing import Any

import torch
import transformers

VOCABULARY = 97
WINDOW = 6
"""Shorter than most examples of the tests."""

SIZES: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""What most configs call the same."""

ROPE = {"rope_theta": 10000.0, "rope_type": "default"}
OLD = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LATENT = {
    **{"q_lora_rank": 12, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8},
    **{"v_head_dim": 8, "n_routed_experts": 4, "first_k_dense_replace": 1, "n_group": 2},
    **{"topk_group": 1, "moe_intermediate_size": 24, "num_experts_per_tok": 2},
    **{"num_key_value_heads": 4, "n_shared_experts": 1, "head_dim": 4},
}
STATE = {"state_size": 8, "num_heads": 8, "n_groups": 2, "chunk_size": 8}
MAMBA = {
    **{"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1},
    **{"mamba_d_state": 8, "mamba_d_conv": 4, "mamba_expand": 1, "mamba_chunk_size": 8},
}
MIXED_LAYERS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}

PACKED: Mapping[str, Mapping[str, Any]] = {
    "llama": {},
    "llama-dynamic-rope": {
        "rope_parameters": {**ROPE, "rope_type": "dynamic", "factor": 2.0},
        "max_position_embeddings": 20,
    },
    "mistral": {"sliding_window": WINDOW},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": WINDOW},
    "qwen3": {},
    "gemma": {},
    "gemma2": {"sliding_window": WINDOW, "query_pre_attn_scalar": 8},
    "gemma3_text": {**MIXED_LAYERS, "query_pre_attn_scalar": 8},
    "phi": {},
    "phi3": {"sliding_window": WINDOW},
    "gpt2": OLD,
    "gpt_neox": {},
    "gpt_bigcode": OLD,
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0},
    "starcoder2": {"sliding_window": WINDOW},
    "olmo": {},
    "olmo2": {},
    "olmo3": MIXED_LAYERS,
    "granite": {},
    "cohere": {},
    "cohere2": MIXED_LAYERS,
    "smollm3": {"no_rope_layers": [1, 0]},
    "gpt_oss": {**MIXED_LAYERS, "num_local_experts": 4, "num_experts_per_tok": 2},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {**MIXTURE, "shared_expert_intermediate_size": 24},
    "qwen3_moe": MIXTURE,
    "deepseek_v2": {**LATENT, "topk_method": "greedy"},
    "deepseek_v3": LATENT,
    "llama4_text": {
        **{"num_local_experts": 2, "attention_chunk_size": WINDOW, "intermediate_size_mlp": 48},
        **{"layer_types": ["chunked_attention", "full_attention"], "no_rope_layers": [1, 0]},
    },
    "persimmon": {},
    "helium": {},
    "glm": {"partial_rotary_factor": 0.5},
    "exaone4": MIXED_LAYERS,
    "ministral": MIXED_LAYERS,
    "seed_oss": {},
    "apertus": {},
    "arcee": {},
    "ernie4_5": {},
    "hunyuan_v1_dense": {},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "olmoe": MIXTURE,
    "dbrx": {
        **{"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 128},
        "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
    },
}
"""Families whose examples share rows; the key is the model type, then a dash and a variant."""

SINGLE: Mapping[str, Mapping[str, Any]] = {
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "window_size": 4},
    "gptj": {**OLD, "rotary_dim": 4},
    "codegen": {**OLD, "rotary_dim": 4, "n_head": 4, "n_embd": 32},
    "stablelm": {},
    "nemotron": {},
    "bloom": {"n_layer": 2, "n_head": 4},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 128, "expansion_ratio": 2},
    "falcon": {"head_dim": None},
    "falcon-alibi": {"head_dim": None, "alibi": True},
    "xglm": {"d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4},
    "mamba": STATE,
    "mamba2": {**STATE, "head_dim": 8},
    "falcon_mamba": STATE,
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 32},
    "jamba": {
        **{"mamba_d_state": 8, "mamba_dt_rank": 4, "num_experts": 2, "use_mamba_kernels": False},
        **{"attn_layer_period": 2, "attn_layer_offset": 1},
    },
    "bamba": {**MAMBA, "attn_layer_indices": [1], "mamba_expand": 1},
    "zamba": {
        **{"num_hidden_layers": 4, "mamba_d_state": 8, "use_mamba_kernels": False},
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
    },
    "zamba2": {
        **{"num_hidden_layers": 4, "mamba_d_state": 8, "mamba_ngroups": 1, "n_mamba_heads": 4},
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        **{"use_mem_rope": True, "chunk_size": 8, "head_dim": None},
    },
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 6},
    "rwkv": {"attention_hidden_size": 32, "context_length": 128},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_ff_dim": 48},
    "qwen3_next": {
        **MIXTURE,
        **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8},
        **{"linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"]},
        **{"shared_expert_intermediate_size": 24},
    },
    "granitemoehybrid": {
        **MAMBA,
        **{"layer_types": ["mamba", "attention"], "num_local_experts": 2},
        **{"num_experts_per_tok": 1, "shared_intermediate_size": 24},
    },
    "minimax": {
        **{"layer_types": ["linear_attention", "full_attention"], "block_size": 8},
        **{"num_local_experts": 2, "num_experts_per_tok": 1},
    },
}
"""Families of which one example is computed per row."""


def build(family: str, options: Mapping[str, Any], fill: bool = True) -> Any:
    """A model of random weights in transformers' default attention."""
    changed = {**SIZES, "rope_parameters": dict(ROPE), **options}
    config = transformers.AutoConfig.for_model(
        family.partition("-")[0], **{k: v for k, v in changed.items() if v is not None}
    )
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = transformers.AutoModelForCausalLM.from_config(config)
    if fill:
        spread(model)
    return model.eval()


def spread(model: Any) -> None:
    """Make every weight count: biases and norms are not at their defaults."""
    draw = torch.Generator().manual_seed(11)
    for name, weight in model.named_parameters():
        if weight.dim() == 1 and not name.endswith(("A_log", "dt_bias", "D")):
            weight.data += 0.1 * torch.randn(weight.shape, generator=draw)
