import numpy as np
import peft
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
from support.peft_folders import Q0, Q1, V0, key, outcome, store, tensors_of

CONFIGS = [
    ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
    ({"peft_type": "absent"}, "peft_type is None"),
    ({"r": 0}, "'r' is 0: input should be greater than 0"),
    ({"r": -3}, "'r' is -3"),
    ({"r": 2.5}, "'r' is 2.5"),
    ({"r": True}, "'r' is True"),
    ({"r": "two"}, "'r' is 'two'"),
    ({"r": None}, "'r' is None"),
    ({"lora_alpha": "2e3"}, "'lora_alpha' is '2e3'"),
    ({"lora_alpha": True}, "'lora_alpha' is True"),
    ({"lora_alpha": 10**400}, "'lora_alpha' is 1000"),
    ({"use_rslora": "yes"}, "'use_rslora' is 'yes'"),
    ({"base_model_name_or_path": 7}, "'base_model_name_or_path' is 7"),
    ({"rank_pattern": {"q_proj": 2.5}}, "'rank_pattern.q_proj' is 2.5"),
    ({"rank_pattern": {"q_proj": 0}}, "has rank 2, but .* says 0"),
    ({"rank_pattern": {"q_proj": -1}}, "has rank 2, but .* says -1"),
    ({"layers_to_transform": ["0"]}, "layers_to_transform is"),
    ({"target_modules": [1]}, "target_modules is"),
    ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, "does not choose"),
    ({"target_modules": ["q_proj"], "layers_to_transform": 0}, f"adapts '{Q1}', which target_mod"),
    ({"target_modules": ".*v_proj"}, f"adapts '{Q0}', which target_modules"),
    ({"rank_pattern": ["q_proj"]}, "'rank_pattern' is"),
    ({"alpha_pattern": {"q_proj": "four"}}, "'alpha_pattern.q_proj' is 'four'"),
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
    ({"enable_lora": [True, False, True]}, "enable_lora is"),
    ({"use_mora": True}, "use_mora is True"),
    (
        {"use_novelty": True, "peft_version": "0.99.1.dev0"},
        r"'use_novelty' is True, a setting of PEFT '0\.99\.1\.dev0', which is newer",
    ),
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
    {"bias": None, "use_rslora": None, "use_dora": None, "base_model_name_or_path": ""},
    {"target_modules": "All-Linear"},
    {"fan_in_fan_out": True},
    {"target_modules": "all-linear"},
    {"target_modules": [Q0, Q1]},
    {"target_modules": None},
    {"use_novelty": None, "novelties": [], "peft_version": "0.99.0"},
    {"use_novelty": True, "peft_version": "0.21.7"},
    {"lora_dtype": "float16", "lorap_emb_lr": 1e-6, "trained_with": {"name": "x"}},
    {"enable_lora": None, "merge_weights": False},
    {"r": "2", "lora_alpha": " 6.0"},
    {"r": 2.0, "lora_alpha": 6, "alpha_pattern": {"q_proj": "6"}},
    {"r": 8, "rank_pattern": {"q_proj": "2"}},
    {"target_modules": ".*_proj"},
    {"target_modules": r"(?!.*vision).*q_proj"},
    {"target_modules": ["q_proj"], "layers_to_transform": [0, 1]},
    {"exclude_modules": ["lm_head"], "layers_pattern": "layers"},
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


def test_a_missing_rank_and_alpha_are_those_of_peft(tmp_path):
    config = peft.LoraConfig()
    assert (config.r, config.lora_alpha) == (8, 8)
    stored = read(store(tmp_path, tensors_of({Q0: 8}), r="absent", lora_alpha="absent"))
    assert stored.layers[Q0].scale == 1
    assert stored.notes == (
        "adapter_config.json does not give r and lora_alpha; PEFT's default, 8, counts.",
    )


def test_what_is_ignored_is_said(tmp_path):
    extra = {f"extra_{number}": 1 for number in range(7)}
    (note,) = read(store(tmp_path, **extra)).notes
    assert "does not know and ignores: 'extra_0'" in note and "and 2 more" in note


def test_a_module_of_rank_0_has_no_update(tmp_path):
    tensors = tensors_of({Q0: 2}) | {
        key(V0, "A"): torch.zeros(0, 7),
        key(V0, "B"): torch.zeros(11, 0),
    }
    folder = store(
        tmp_path, tensors, rank_pattern={"v_proj": 0}, target_modules=["q_proj", "v_proj"]
    )
    stored = read(folder)
    assert set(stored.adapter) == {Q0}
    assert "rank_pattern gives 1 modules the rank 0" in stored.notes[0]
    tensors = {name: tensors[name] for name in (key(V0, "A"), key(V0, "B"))}
    with pytest.raises(AdapterError, match="no factors of a rank above 0"):
        read(store(tmp_path, tensors, rank_pattern={"v_proj": 0}, target_modules=["v_proj"]))


def test_a_byte_order_mark_is_not_part_of_the_configuration(tmp_path):
    path = store(tmp_path) / CONFIG
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read(tmp_path).ranks == {Q0: 2, Q1: 2}
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n")
    with pytest.raises(AdapterError, match=r"Git LFS pointer.*git lfs pull"):
        read(tmp_path)


def test_of_a_run_the_adapter_of_the_last_round_is_read(tmp_path, adapter):
    for number in (1, 2, 10):
        write(adapter, tmp_path / "rounds" / f"{number:05d}" / "adapter")
    assert read(tmp_path).directory == tmp_path / "rounds" / "00010" / "adapter"
