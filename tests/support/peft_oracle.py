"""PEFT as the oracle: adapters that it trains and saves, and what it makes of adapters."""

import copy
import json
import warnings

import peft
import torch
import transformers
from safetensors.torch import load_file, save_file

from flexlora.peft_format import CONFIG, WEIGHTS

VOCABULARY, HIDDEN, WIDE = 37, 12, 20


def llama(layers=2, **settings):
    """A tiny Llama in float64; equal calls give equal weights."""
    torch.manual_seed(3)
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": WIDE,
        "num_hidden_layers": layers,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "tie_word_embeddings": False,
    }
    config = transformers.LlamaConfig(**(sizes | settings))
    return transformers.LlamaForCausalLM(config).double()


def gpt2():
    """A tiny GPT-2, whose layers are Conv1D."""
    torch.manual_seed(4)
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=HIDDEN, n_layer=2, n_head=2, n_positions=9
    )
    return transformers.GPT2LMHeadModel(config).double()


def t5():
    """A tiny T5, whose decoder attends to its encoder."""
    torch.manual_seed(5)
    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=HIDDEN, d_kv=4, d_ff=WIDE, num_layers=2, num_heads=3
    )
    return transformers.T5ForConditionalGeneration(config).double()


def trained(model, folder, seed, copies=False, **settings):
    """An adapter of ``model`` with random values, as PEFT saves it in float32."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**settings))
        for name, value in adapted.named_parameters():
            if "lora_" in name:
                value.data = torch.randn_like(value).float() / 4
        adapted.save_pretrained(folder, save_embedding_layers=copies)
    return folder


def rewrite(folder, tensors=None, **config):
    """Change the tensors' names, by a function, and settings of an adapter on the disk."""
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    if tensors:
        values = load_file(folder / WEIGHTS)
        save_file({tensors(name): value for name, value in values.items()}, folder / WEIGHTS)
    return folder


def loaded(model, folder, **options):
    """The model with the adapter, as PEFT loads it, and whether PEFT missed tensors."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        adapted = peft.PeftModel.from_pretrained(copy.deepcopy(model), folder, **options)
    missing = any("missing adapter keys" in str(each.message) for each in caught)
    return adapted, missing


def deltas(model, folder):
    """What PEFT adds to each module's weight, in float64, without what it leaves as it is."""
    adapted, _ = loaded(model, folder)
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").detach()
        for name, module in adapted.double().named_modules()
        if hasattr(module, "get_delta_weight") and module.r.get("default")
    }


def difference(found, expected):
    """The largest relative difference of a module; modules that one side lacks are zero there."""
    worst = 0.0
    for name in {*found, *expected}:
        zero = torch.zeros_like(found[name] if name in found else expected[name])
        one, two = found.get(name, zero), expected.get(name, zero)
        worst = max(worst, float((one - two).norm() / max(float(two.norm()), 1e-30)))
    return worst


def weighted(*terms):
    """The sum of deltas, each with its weight."""
    total = {}
    for weight, values in terms:
        for name, value in values.items():
            total[name] = total.get(name, 0) + weight * value
    return total
