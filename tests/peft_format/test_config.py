import numpy as np
import pytest
import torch

from flexlora.errors import AdapterError
from flexlora.peft_format import (
    CONFIG,
    WEIGHTS,
    Unsupported,
    read,
    write,
)
from support.peft_folders import Q0, Q1, outcome, store

CONFIGS = [
    ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
    ({"peft_type": "absent"}, "peft_type is None"),
    ({"r": "absent"}, "'r' is missing"),
    ({"r": 0}, "'r' is 0: input should be greater than 0"),
    ({"r": -3}, "'r' is -3"),
    ({"r": 2.0}, "'r' is 2.0"),
    ({"r": True}, "'r' is True"),
    ({"r": "2"}, "'r' is '2'"),
    ({"lora_alpha": "absent"}, "'lora_alpha' is missing"),
    ({"lora_alpha": "16"}, "'lora_alpha' is '16'"),
    ({"lora_alpha": True}, "'lora_alpha' is True"),
    ({"lora_alpha": 10**400}, "'lora_alpha' is 1000"),
    ({"use_rslora": "yes"}, "'use_rslora' is 'yes'"),
    ({"base_model_name_or_path": 7}, "'base_model_name_or_path' is 7"),
    ({"rank_pattern": {"q_proj": 2.5}}, "'rank_pattern.q_proj' is 2.5"),
    ({"rank_pattern": {"q_proj": 0}}, "rank_pattern gives 'q_proj' the rank 0"),
    ({"rank_pattern": ["q_proj"]}, "'rank_pattern' is"),
    ({"alpha_pattern": {"q_proj": "4"}}, "'alpha_pattern.q_proj' is '4'"),
    ({"rank_pattern": {"q_(proj": 2}}, r"rank_pattern: 'q_\(proj' is not a regular expression"),
    ({"alpha_pattern": {"[z-a]": 2}}, "alpha_pattern: .* is not a regular expression"),
    ({"alpha_pattern": {"(a+)+b": 2}}, r"alpha_pattern: '\(a\+\)\+b' repeats a group"),
    ({"alpha_pattern": {"(q|q){30}": 2}}, "repeats a group"),
    ({"alpha_pattern": {r"(q)\1": 2}}, "uses more of regular expressions"),
    ({"alpha_pattern": {"(?=q).*": 2}}, "uses more of regular expressions"),
    ({"alpha_pattern": {"(?i:q)": 2}}, "uses more of regular expressions"),
    ({"alpha_pattern": {"x" * 513: 2}}, "a pattern of 513 characters"),
    ({"alpha_pattern": {".*" * 9 + "x": 2}}, "could take too long to match"),
    ({"alpha_pattern": {"(a|a)" * 80: 2}}, "could take too long to match"),
    ({"target_modules": ["k_proj"]}, f"adapts '{Q0}', which target_modules"),
    ({"r": 3}, rf"{WEIGHTS}: '.*{Q0}.lora_A.weight' has rank 2, but .*{CONFIG} says 3"),
]


@pytest.mark.parametrize(("config", "message"), CONFIGS)
def test_refuses_configurations(tmp_path, config, message):
    with pytest.raises(ValueError, match=message) as caught:
        read(store(tmp_path, **config))
    assert CONFIG in str(caught.value)
    assert not isinstance(caught.value, Unsupported)


VARIANTS = [
    ({"use_dora": True}, "use_dora is True: DoRA"),
    ({"lora_bias": True}, "lora_bias is True"),
    ({"use_qalora": True}, "use_qalora is True"),
    ({"bias": "lora_only"}, "bias is 'lora_only'"),
    ({"bias": "all"}, "bias is 'all'"),
    ({"modules_to_save": ["lm_head"]}, r"modules_to_save is \['lm_head'\]"),
    ({"target_parameters": ["experts.gate"]}, "target_parameters is"),
    ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication is"),
    ({"alora_invocation_tokens": [5, 6]}, "alora_invocation_tokens is"),
    ({"trainable_token_indices": [1]}, "trainable_token_indices is"),
    ({"use_bdlora": {"nblocks": 2}}, "use_bdlora is"),
    ({"kasa_config": {"beta": 0.1}}, "kasa_config is"),
    ({"arrow_config": {"top_k": 3}}, "arrow_config is"),
    ({"monteclora_config": {"num_samples": 3}}, "monteclora_config is"),
    ({"velora_config": {"scale": 1.0}}, "velora_config is"),
    ({"megatron_config": {"x": 1}}, "megatron_config is"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'.*path_initial_model"),
    ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights is 'pissa_niter_16'"),
    ({"init_lora_weights": "OLoRA"}, "init_lora_weights is 'olora'"),
    ({"init_lora_weights": "corda"}, "init_lora_weights is 'corda'"),
    ({"init_lora_weights": "lora_ga"}, "init_lora_weights is 'lora_ga'"),
    ({"init_lora_weights": "loftq"}, "init_lora_weights is 'loftq'.*train a LoRA with"),
    ({"init_lora_weights": 1}, "init_lora_weights is 1"),
    ({"use_novelty": True}, "'use_novelty' is True, an unknown setting"),
]


@pytest.mark.parametrize(("config", "message"), VARIANTS)
def test_refuses_what_is_more_than_b_times_a(tmp_path, config, message):
    with pytest.raises(Unsupported, match=message) as caught:
        read(store(tmp_path, **config))
    assert CONFIG in str(caught.value)


HARMLESS = [
    {"init_lora_weights": "gaussian"},
    {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}},
    {"init_lora_weights": "orthogonal"},
    {"init_lora_weights": "mica"},
    {"init_lora_weights": False},
    {"fan_in_fan_out": True},
    {"target_modules": "all-linear"},
    {"target_modules": [Q0, Q1]},
    {"target_modules": None},
    {"use_novelty": None, "novelties": []},
    {"lora_alpha": 6.0, "rank_pattern": None, "alpha_pattern": None},
]


@pytest.mark.parametrize("config", HARMLESS)
def test_accepts_what_changes_nothing(tmp_path, config):
    plain = read(store(tmp_path / "plain")).adapter[Q1]
    other = read(store(tmp_path / "other", **config)).adapter[Q1]
    assert torch.equal(other.B @ other.A, plain.B @ plain.A)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '"LORA"', "nul", '{"r": NaN}', '{"r": 1, "r": 2}', "[" * 100_000],
)
def test_refuses_configurations_that_are_not_json_objects(tmp_path, text):
    (store(tmp_path) / CONFIG).write_text(text)
    with pytest.raises(
        ValueError, match=rf"{CONFIG}.* (is not valid JSON|does not contain a JSON object)"
    ):
        read(tmp_path)
    (tmp_path / CONFIG).write_bytes(b'{"r": "\xff"}')
    with pytest.raises(ValueError, match=f"{CONFIG} is not valid JSON"):
        read(tmp_path)


def test_refuses_a_huge_configuration(tmp_path):
    with (store(tmp_path) / CONFIG).open("ab") as file:
        file.truncate((16 << 20) + 1)
    with pytest.raises(ValueError, match=f"{CONFIG} has 16777217 bytes"):
        read(tmp_path)


def test_mutated_configurations_are_refused_or_read_but_never_crash(tmp_path):
    rank_pattern = {"layers.0.*q_proj": 2, r"(a|b)\.q_proj": 3}
    path = store(tmp_path, rank_pattern=rank_pattern, alpha_pattern={"q": 1}) / CONFIG
    sound = path.read_bytes()
    random = np.random.default_rng(8)
    refused = 0
    for _ in range(300):
        data = bytearray(sound)
        for _ in range(int(random.integers(1, 4))):
            data[int(random.integers(len(data)))] = int(random.integers(32, 127))
        path.write_bytes(data)
        refused += outcome(tmp_path) is not None
    assert refused > 150


def test_the_last_adapter_of_a_run_folder_is_suggested(tmp_path, adapter):
    for number in (1, 2, 10):
        write(adapter, tmp_path / "rounds" / f"{number:05d}" / "adapter")
    with pytest.raises(AdapterError, match=r"perhaps .*rounds.00010.adapter\."):
        read(tmp_path)
