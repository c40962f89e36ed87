"""What the proof at load finds, and what it leaves as it was."""

import numpy as np
import pytest
import torch
import transformers

from flexlora.errors import ConfigError
from flexlora.model import base as base_module
from flexlora.model import proof
from flexlora.model.base import Rows
from flexlora.model.layers.attention import MaskRule
from flexlora.model.layers.lora import Layout
from support import families

FAMILIES = {**families.PACKED, **families.SINGLE}


def proven(family: str, dtype: torch.dtype = torch.float32, **options):
    return proof.proven(families.build(family, FAMILIES[family]).to(dtype), None, family, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("family", "rows"),
    [
        *((name, Rows.SHARED) for name in ("llama", "gemma3_text", "gpt2", "glm", "mixtral")),
        *((name, Rows.PADDED) for name in ("mamba", "falcon_h1", "recurrent_gemma", "rwkv")),
        *((name, Rows.PADDED) for name in ("zamba2", "qwen3_next", "lfm2", "mpt")),
    ],
)
def test_half_precision_tells_rounding_from_faults(family, rows, dtype):
    assert proven(family, dtype).rows is rows


def test_a_window_that_is_not_kept_is_found(monkeypatch):
    monkeypatch.setattr(MaskRule, "is_causal", lambda *_: True)
    base = proven("mistral")
    assert base.rows is Rows.PADDED
    assert "model.layers.0.self_attn (MistralAttention)" in base.notices[-1]


def test_positions_that_go_on_from_one_example_to_the_next_are_found(monkeypatch):
    def counted(values, device):
        wrong = values.dtype == torch.int64 and values.shape[0] == 1 and not values[0, 0]
        return torch.arange(values.shape[1])[None] if wrong and values.dim() == 2 else values

    monkeypatch.setattr(base_module, "to_device", counted)
    assert proven("opt").rows is not Rows.SHARED


def test_adapters_that_reach_the_tokens_of_others_are_found(monkeypatch):
    spans = Layout.spans

    def shifted(layout, rows, adapters):
        found = spans(layout, rows, adapters)
        return found if adapters < 2 or layout.only is not None else found[::-1]

    assert proven("llama").rows is Rows.SHARED
    monkeypatch.setattr(Layout, "spans", shifted)
    assert proven("llama").rows is Rows.PADDED


def test_a_model_that_no_way_gives_right_is_refused(monkeypatch):
    stock = proof.stock

    def other(model, name):
        found = stock(model, name)
        return proof.Stock(
            found.examples, [-logits for logits in found.logits], found.tolerance, found.idle
        )

    monkeypatch.setattr(proof, "stock", other)
    with pytest.raises(ConfigError, match=r"'llama' cannot be trained: .*set model\.name"):
        proven("llama")


def test_the_proof_is_the_same_every_time_and_draws_no_random_numbers():
    model = families.build("llama", {})
    torch.manual_seed(3)
    np.random.seed(3)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    first, second = (proof.stock(model, "llama") for _ in range(2))
    proof.proven(model, None, "llama")
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])
    assert first.tolerance == second.tolerance
    assert all(torch.equal(a, b) for a, b in zip(first.logits, second.logits, strict=True))
    hooks = [each for module in model.modules() for each in module._forward_hooks]
    assert not hooks


def test_what_is_not_adapted_is_said():
    (experts,) = proven("mixtral").notices
    assert "model.layers.0.mlp.experts" in experts
    assert proven("mixtral", targets=("q_proj",)).notices == ()
    assert proven("llama").notices == ()
    mamba = proven("mamba")
    assert not any(path.endswith("out_proj") for path in mamba.shapes)
    assert "out_proj are not adapted" in mamba.notices[0]
    for family, name in (("falcon_h1", "out_proj"), ("qwen3_moe", "gate_proj")):
        with pytest.raises(ConfigError, match=f"'{name}', which PEFT would not adapt: .*set model"):
            proven(family, targets=(name, "q_proj"))


def test_a_vision_tower_is_not_adapted():
    text = {**families.SIZES, "rope_parameters": dict(families.ROPE), "sliding_window": 64}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 4, "image_size": 16, "patch_size": 8}
    config = transformers.Gemma3Config(
        text_config=transformers.Gemma3TextConfig(**text),
        vision_config=transformers.SiglipVisionConfig(**vision),
        mm_tokens_per_image=1,
        image_token_index=90,
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    base = proof.proven(model, None, "gemma3")
    assert base.rows is Rows.SHARED
    assert not any("vision" in path for path in base.shapes)
    assert "linear layers, such as" in base.notices[0]
    assert "vision" in base.notices[0]


def test_only_the_layers_of_gpt_2_have_transposed_weights():
    gpt, llama = proven("gpt2"), proven("llama")
    assert (gpt.fan_in_fan_out, llama.fan_in_fan_out) == (True, False)
    assert gpt.shapes["transformer.h.0.attn.c_attn"] == (96, 32)


def test_a_precision_in_which_the_model_overflows_is_named():
    model = families.build("llama", {})
    model.lm_head.weight.data *= 1e6
    with pytest.raises(ConfigError, match=r"not finite in torch.float16; set model\.dtype"):
        proof.proven(model.to(torch.float16), None, "llama")
