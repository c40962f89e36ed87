"""PEFT as the oracle: it reads what we write, and we read what it saves."""

import json

import peft
import pytest
import torch
import transformers

from flexlora.peft_format import (
    CONFIG,
    Unsupported,
    read,
    targets,
    write,
)
from support.peft_folders import HIDDEN, WIDE, factors

VOCABULARY = 37


def llama():
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=WIDE,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
    )
    return transformers.LlamaForCausalLM(config)


def weights(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("rank", ["max", "vllm"])
def test_peft_merges_what_we_write(tmp_path, adapter, rank):
    model = llama()
    before = weights(model)
    write(adapter, tmp_path / "out", "some/base", rank=rank)
    merged = weights(peft.PeftModel.from_pretrained(model, tmp_path / "out").merge_and_unload())
    changed = set()
    for name, value in merged.items():
        delta = value - before[name]
        module = name.removesuffix(".weight")
        if module in adapter:
            changed.add(module)
            expected = adapter[module].B @ adapter[module].A
            torch.testing.assert_close(delta, expected, atol=1e-6, rtol=1e-5)
        else:
            assert not delta.any()
    assert changed == set(adapter)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_peft_finds_no_tensor_missing_in_a_whole_adapter(tmp_path):
    whole = {
        f"model.layers.{layer}.mlp.down_proj": factors(HIDDEN, WIDE, 2 + layer, layer)
        for layer in range(2)
    }
    base = llama()
    paths = [path for path, _ in base.named_modules()]
    write(whole, tmp_path / "out", target_modules=targets(whole, paths))
    model = peft.PeftModel.from_pretrained(base, tmp_path / "out")
    assert model.peft_config["default"].target_modules == {"down_proj"}
    assert sum(".lora_A." in name for name in model.state_dict()) == 2


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize(
    # The two match one module; PEFT sorts them on saving, so what it loads counts.
    "alpha_pattern",
    [{}, {"v_proj": 11, r"layers\.0\..*": 13}],
)
@pytest.mark.parametrize("rank_pattern", [{}, {r"layers\.1\..*q_proj": 5, "down_proj": 2}])
def test_we_read_what_peft_saves(tmp_path, rank_pattern, alpha_pattern, rslora):
    config = peft.LoraConfig(
        r=3,
        lora_alpha=7,
        target_modules=["q_proj", "v_proj", "down_proj"],
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
        use_rslora=rslora,
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    base = llama()
    before = weights(base)
    peft.get_peft_model(base, config).save_pretrained(tmp_path)
    stored = read(tmp_path)
    base = llama()
    base.load_state_dict(before)
    merged = weights(peft.PeftModel.from_pretrained(base, tmp_path).merge_and_unload())
    assert len(stored.adapter) == 6
    for module, update in stored.adapter.items():
        delta = merged[f"{module}.weight"] - before[f"{module}.weight"]
        torch.testing.assert_close(update.B @ update.A, delta, atol=1e-6, rtol=1e-5)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_transposed_base_weights_leave_the_factors_as_they_are(tmp_path):
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=HIDDEN, n_layer=1, n_head=2, n_positions=9
    )
    base = transformers.GPT2LMHeadModel(config)
    before = weights(base)
    lora = peft.LoraConfig(
        r=2, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False
    )
    model = peft.get_peft_model(base, lora)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["fan_in_fan_out"] is True
    update = read(tmp_path).adapter["transformer.h.0.attn.c_attn"]
    name = "transformer.h.0.attn.c_attn.weight"
    delta = weights(model.merge_and_unload())[name] - before[name]
    torch.testing.assert_close((update.B @ update.A).T, delta, atol=1e-6, rtol=1e-5)
    assert update.shape == (3 * HIDDEN, HIDDEN)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("init", ["gaussian", "orthogonal", "mica", "pissa", "olora"])
def test_initialisations_are_judged_by_what_they_do_to_the_base(tmp_path, init):
    base = llama()
    before = weights(base)["model.layers.0.self_attn.q_proj.weight"]
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=init)
    model = peft.get_peft_model(base, config)
    after = base.model.layers[0].self_attn.q_proj.base_layer.weight
    model.save_pretrained(tmp_path)
    if torch.equal(before, after):
        assert len(read(tmp_path).adapter) == 2
    else:
        with pytest.raises(Unsupported, match=f"init_lora_weights is '{init}'"):
            read(tmp_path)
