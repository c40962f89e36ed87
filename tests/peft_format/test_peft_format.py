import dataclasses
import json
import math
import pickle
import time
import zipfile

import numpy as np
import peft
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file

from flexlora.errors import AdapterError
from flexlora.lowrank.factors import Adapter, Factors
from flexlora.peft_format import (
    CARD,
    CONFIG,
    VLLM_RANKS,
    WEIGHTS,
    Unsupported,
    matched,
    read,
    targets,
    write,
)

Q0 = "model.layers.0.self_attn.q_proj"
V0 = "model.layers.0.self_attn.v_proj"
Q1 = "model.layers.1.self_attn.q_proj"
D1 = "model.layers.1.mlp.down_proj"
HIDDEN, WIDE, VALUES, VOCABULARY = 12, 20, 4, 37


def matrix(rows, columns, seed):
    values = np.random.default_rng(seed).normal(size=(rows, columns))
    return torch.tensor(values, dtype=torch.float32)


def factors(out, width, rank, seed):
    return Factors(matrix(out, rank, seed), matrix(rank, width, seed + 100))


@pytest.fixture
def adapter():
    return Adapter(
        {
            Q0: factors(HIDDEN, HIDDEN, 2, 1),
            V0: factors(VALUES, HIDDEN, 3, 2),
            D1: factors(HIDDEN, WIDE, 5, 3),
        }
    )


def key(module, half):
    return f"base_model.model.{module}.lora_{half}.weight"


def tensors_of(ranks):
    """A and B of a (11, 7) layer for each module, as stored."""
    tensors = {}
    for seed, (module, rank) in enumerate(ranks.items()):
        tensors[key(module, "A")] = matrix(rank, 7, 10 + seed)
        tensors[key(module, "B")] = matrix(11, rank, 20 + seed)
    return tensors


def store(folder, tensors=None, **config):
    """An adapter directory made without PEFT and without `write`."""
    folder.mkdir(exist_ok=True)
    plain = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["q_proj"]}
    merged = {name: value for name, value in (plain | config).items() if value != "absent"}
    (folder / CONFIG).write_text(json.dumps(merged))
    save_file(tensors_of({Q0: 2, Q1: 2}) if tensors is None else tensors, folder / WEIGHTS)
    return folder


# --- reading -------------------------------------------------------------------------------


@pytest.mark.parametrize("rslora", [False, True])
def test_folds_the_scale_and_honours_patterns(tmp_path, rslora):
    tensors = tensors_of({Q0: 2, Q1: 5})
    store(
        tmp_path,
        tensors,
        rank_pattern={r"layers\.1\.self_attn\.q_proj": 5, "q_proj": 2, ".*": 9},
        alpha_pattern={"^model.layers.0.*": 3.5},
        r=8,
        use_rslora=rslora,
    )
    stored = read(tmp_path)
    for module, rank, alpha in ((Q0, 2, 3.5), (Q1, 5, 6)):
        scale = alpha / (math.sqrt(rank) if rslora else rank)
        expected = scale * tensors[key(module, "B")] @ tensors[key(module, "A")]
        torch.testing.assert_close(stored.adapter[module].B @ stored.adapter[module].A, expected)
        assert stored.layers[module].scale == scale
    assert stored.ranks == {Q0: 2, Q1: 5}


def test_patterns_match_whole_names_only(tmp_path):
    stored = read(store(tmp_path, alpha_pattern={"proj": 100, "self_attn": 50, "": 7}))
    assert {layer.scale for layer in stored.layers.values()} == {3.0}


def test_values_are_read_on_look_up(tmp_path):
    tensors = tensors_of({Q0: 2, Q1: 2})
    tensors[key(Q1, "B")][3, 1] = math.nan
    stored = read(store(tmp_path, tensors))
    assert stored.adapter[Q0].shape == (11, 7)
    place = rf"{WEIGHTS}: 'base_model\.model\.{Q1}\.lora_B\.weight' contains NaN"
    with pytest.raises(ValueError, match=place):
        stored.adapter[Q1]
    with pytest.raises(ValueError, match=place):
        stored.loaded()


def test_loaded_outlives_the_file(tmp_path):
    lazy = read(store(tmp_path))
    loaded = lazy.loaded()
    expected = lazy.adapter[Q0]
    (tmp_path / WEIGHTS).unlink()
    torch.testing.assert_close(loaded.adapter[Q0].B, expected.B)
    with pytest.raises(ValueError, match=f"{WEIGHTS} can no longer be read"):
        lazy.adapter[Q0]


def test_a_file_that_changes_is_noticed(tmp_path):
    lazy = read(store(tmp_path))
    save_file(tensors_of({Q0: 3, D1: 4}), tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match="has changed since it was opened"):
        lazy.adapter[Q0]


def test_unknown_modules_are_key_errors(tmp_path):
    stored = read(store(tmp_path))
    assert "other" not in stored.adapter
    with pytest.raises(KeyError):
        stored.adapter["other"]


def test_lazy_adapters_can_be_pickled_to_workers(tmp_path):
    stored = read(store(tmp_path))
    copy = pickle.loads(pickle.dumps(stored))
    torch.testing.assert_close(copy.adapter[Q1].A, stored.adapter[Q1].A)


def test_dtypes_as_stored_and_as_requested(tmp_path):
    tensors = {name: value.bfloat16() for name, value in tensors_of({Q0: 2}).items()}
    store(tmp_path, tensors, lora_alpha=0.7)
    exact = tensors[key(Q0, "B")].float() * 0.35
    assert read(tmp_path, dtype=None).adapter[Q0].B.dtype == torch.bfloat16
    assert torch.equal(read(tmp_path, dtype=None).adapter[Q0].B, exact.bfloat16())
    assert torch.equal(read(tmp_path).adapter[Q0].B, exact)
    wide = read(tmp_path, torch.float64).adapter[Q0].B
    assert torch.equal(wide, tensors[key(Q0, "B")].double() * 0.35)


def test_overflow_in_folding_is_refused(tmp_path):
    tensors = {name: value.half() for name, value in tensors_of({Q0: 2}).items()}
    store(tmp_path, tensors, lora_alpha=1e7)
    assert read(tmp_path).adapter[Q0].B.isfinite().all()
    with pytest.raises(ValueError, match=rf"'{Q0}' overflows torch.float16"):
        read(tmp_path, dtype=None).adapter[Q0]


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


STRANGE = [
    (f"base_model.model.{Q0}.lora_magnitude_vector", "belongs to DoRA"),
    ("base_model.model.model.embed_tokens.lora_embedding_A", "adapts an embedding"),
    (f"base_model.model.{Q0}.lora_B.bias", "is a trained bias"),
    ("base_model.model.lm_head.weight", "is a whole tensor"),
    ("base_model.model.score.modules_to_save.weight", "is a whole tensor"),
    (f"base_model.model.{Q0}.lora_A.default.weight", "carries the adapter name 'default'"),
    (f"{Q0}.lora_A.weight", "is not of the form base_model.model.MODULE"),
    (f"diffusion_model.{Q0}.lora_A.weight", "is not of the form"),
    (f"base_model.model.{Q0}.lora_C.weight", "is not of the form"),
    ("", "is not of the form"),
    ("base_model.model.a..b.lora_A.weight", "is not a module path"),
    ("base_model.model.a\x1b[2J.lora_A.weight", "is not a module path"),
    (f"base_model.model.{'x' * 513}.lora_A.weight", "is not a module path"),
]


@pytest.mark.parametrize(("name", "message"), STRANGE)
def test_refuses_strange_tensors(tmp_path, name, message):
    store(tmp_path, tensors_of({Q0: 2}) | {name: matrix(2, 7, 5)})
    with pytest.raises(AdapterError, match=message) as caught:
        read(tmp_path)
    assert WEIGHTS in str(caught.value)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 800


A0, B0 = key(Q0, "A"), key(Q0, "B")
SHAPES = [
    ({A0: matrix(2, 7, 1)}, f"'{A0}' is present but '{B0}' is missing"),
    ({B0: matrix(11, 2, 1)}, f"'{B0}' is present but '{A0}' is missing"),
    ({A0: matrix(2, 7, 1), B0: matrix(11, 3, 2)}, "their ranks differ"),
    ({A0: torch.zeros(2, 7, 1), B0: matrix(11, 2, 2)}, rf"'{A0}' has the shape \[2, 7, 1\]"),
    ({A0: matrix(2, 7, 1), B0: torch.zeros(11)}, rf"'{B0}' has the shape \[11\]"),
    ({A0: torch.zeros(2, 0), B0: matrix(11, 2, 2)}, rf"'{A0}' has the shape \[2, 0\]"),
    (
        {A0: torch.ones(2, 7, dtype=torch.int8), B0: matrix(11, 2, 2)},
        f"'{A0}' has the dtype 'I8'",
    ),
    ({}, "contains no tensors"),
]


@pytest.mark.parametrize(("tensors", "message"), SHAPES)
def test_refuses_tensors_that_make_no_product(tmp_path, tensors, message):
    with pytest.raises(ValueError, match=message) as caught:
        read(store(tmp_path, tensors))
    assert WEIGHTS in str(caught.value)


@pytest.mark.parametrize("half", "AB")
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_refuses_values_that_are_not_finite(tmp_path, half, value):
    tensors = tensors_of({Q0: 2})
    tensors[key(Q0, half)][1, 1] = value
    stored = read(store(tmp_path, tensors))
    with pytest.raises(ValueError, match=f"{WEIGHTS}: '.*lora_{half}.weight' contains NaN or inf"):
        stored.adapter[Q0]


def test_refuses_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match="nowhere does not exist"):
        read(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=f"{CONFIG} is missing"):
        read(tmp_path)
    store(tmp_path / "named")
    with pytest.raises(ValueError, match=rf"{CONFIG} is missing.*perhaps .*named"):
        read(tmp_path)
    with pytest.raises(ValueError, match=f"{CONFIG} is a file; give the folder"):
        read(tmp_path / "named" / CONFIG)
    (tmp_path / "named" / WEIGHTS).unlink()
    with pytest.raises(ValueError, match=f"{WEIGHTS} is missing"):
        read(tmp_path / "named")


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt"])
def test_refuses_pickles_without_opening_them(tmp_path, name):
    (store(tmp_path) / WEIGHTS).rename(tmp_path / name)
    with pytest.raises(ValueError, match=f"{name} is a pickle.*safe_serialization=True"):
        read(tmp_path)


def test_refuses_other_files_under_the_name_of_safetensors(tmp_path):
    path = store(tmp_path) / WEIGHTS
    torch.save(tensors_of({Q0: 2}), path)
    with pytest.raises(ValueError, match=f"{WEIGHTS} is not a .* it is a zip.*safe_serial"):
        read(tmp_path)
    path.write_bytes(pickle.dumps({"a": 1}) * 9)
    with pytest.raises(ValueError, match=r"it is a pickle.*safe_serialization"):
        read(tmp_path)
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n")
    with pytest.raises(ValueError, match=r"Git LFS pointer.*git lfs pull"):
        read(tmp_path)
    path.write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(ValueError, match="GGUF file"):
        read(tmp_path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="cut off at 0 bytes"):
        read(tmp_path)
    path.unlink()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x", "y")
    with pytest.raises(ValueError, match="it is a zip"):
        read(tmp_path)


def raw(header):
    data = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(data).to_bytes(8, "little") + data


HEADERS = [
    (b"{" + b'"a":{"b":' * 3000, "not a valid safetensors file"),
    (b'{"a":' + b"[" * 100_000, "not a valid safetensors file"),
    (b"{\xff\xff}      ", "not a valid safetensors file"),
    (b'{"x": NaN}   ', "not a valid safetensors file"),
    (b"{}         ", "contains no tensors"),
]


@pytest.mark.parametrize(("header", "message"), HEADERS)
def test_refuses_broken_headers(tmp_path, header, message):
    (store(tmp_path) / WEIGHTS).write_bytes(raw(header))
    with pytest.raises(ValueError, match=message):
        read(tmp_path)


def test_refuses_a_huge_header(tmp_path):
    with (store(tmp_path) / WEIGHTS).open("wb") as file:
        file.write((33 << 20).to_bytes(8, "little") + b'{"')
        file.truncate(40 << 20)
    with pytest.raises(ValueError, match=r"its header has 34603008 bytes"):
        read(tmp_path)


def test_refuses_a_tensor_named_twice(tmp_path):
    entry = '{"dtype":"F32","shape":[2,7],"data_offsets":[0,56]}'
    header = f'{{"{A0}":{entry},"{A0}":{entry}}}'.encode()
    (store(tmp_path) / WEIGHTS).write_bytes(raw(header) + bytes(56))
    with pytest.raises(ValueError, match="not a valid safetensors file"):
        read(tmp_path)


def test_refuses_entries_that_only_safetensors_understands(tmp_path):
    header = {A0: ["F32", [2, 7], [0, 56]]}
    (store(tmp_path) / WEIGHTS).write_bytes(raw(header) + bytes(56))
    with pytest.raises(ValueError, match=WEIGHTS):
        read(tmp_path)


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


def outcome(folder):
    """None if the adapter can be read through, or the sentence of its refusal."""
    try:
        read(folder).loaded()
    except ValueError as error:
        return str(error)
    return None


def test_mutated_weights_are_refused_or_read_but_never_crash(tmp_path):
    path = store(tmp_path) / WEIGHTS
    sound = path.read_bytes()
    length = int.from_bytes(sound[:8], "little")
    random = np.random.default_rng(7)
    refused = 0
    for trial in range(400):
        data = bytearray(sound)
        if trial % 3 == 0:
            del data[int(random.integers(len(data))) :]
        else:
            for _ in range(int(random.integers(1, 4))):
                place = int(random.integers(8 + length if trial % 3 == 1 else len(data)))
                data[place] ^= 1 << int(random.integers(8))
        path.write_bytes(data)
        refused += outcome(tmp_path) is not None
    assert refused > 200


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


@settings(deadline=None, max_examples=200)
@given(st.text(alphabet=r"aq.*+?()|[]{}\d^$-0,", max_size=14))
def test_patterns_match_as_in_peft_or_are_refused(pattern):
    modules = ["a.q", "q", "aa.aq.q", "a.0.aaaq", "0.a"]
    try:
        values = matched({pattern: 3}, modules, "config: rank_pattern")
    except ValueError:
        return
    for module in modules:
        matches = pattern == get_pattern_key([pattern], module) and pattern != module
        assert bool(values[module]) == (matches or pattern == module)


def test_no_accepted_pattern_takes_long():
    modules = ["a" * 120 for _ in range(40)]
    start = time.perf_counter()
    for pattern in (".*.*x", "a*a*x", ".*a+.*x", "a?" * 12 + "x", "(a|a)" * 9 + "x"):
        try:
            matched({pattern: 1}, modules, "place")
        except ValueError as error:
            assert "too long" in str(error)
    assert time.perf_counter() - start < 10


# --- writing -------------------------------------------------------------------------------


def product(factors):
    return factors.B.double() @ factors.A.double()


def test_round_trip(tmp_path, adapter):
    write(adapter, tmp_path / "out", "some/base", task_type="SEQ_CLS")
    stored = read(tmp_path / "out")
    assert (stored.base_model, stored.task_type) == ("some/base", "SEQ_CLS")
    assert set(stored.adapter) == set(adapter)
    assert stored.ranks == {Q0: 5, V0: 5, D1: 5}
    for module, expected in adapter.items():
        assert torch.equal(stored.adapter[module].first(expected.rank).B, expected.B)
        torch.testing.assert_close(product(stored.adapter[module]), product(expected))
        assert not stored.adapter[module].B[:, expected.rank :].any()


def test_the_written_form_is_the_safe_one(tmp_path, adapter):
    write(adapter, tmp_path / "out", "some/base")
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert config["r"] == config["lora_alpha"] == 5
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert (config["bias"], config["use_rslora"], config["use_dora"]) == ("none", False, False)
    assert config["init_lora_weights"] is True
    card = (tmp_path / "out" / CARD).read_text()
    assert card.startswith('---\nbase_model: "some/base"\nlibrary_name: "peft"\n')


@pytest.mark.parametrize(
    ("rank", "written"), [("max", 5), (5, 5), (6, 6), ("vllm", 8), (VLLM_RANKS[2], 16)]
)
def test_ranks_to_write(tmp_path, adapter, rank, written):
    write(adapter, tmp_path / "out", rank=rank)
    assert set(read(tmp_path / "out").ranks.values()) == {written}


@pytest.mark.parametrize(
    ("rank", "message"),
    [(4, "rank 5, above the requested 4"), ("best", "rank is 'best'"), (True, "rank is True")],
)
def test_refuses_ranks_to_write(tmp_path, adapter, rank, message):
    with pytest.raises(ValueError, match=message):
        write(adapter, tmp_path / "out", rank=rank)
    assert not list(tmp_path.iterdir())


def test_refuses_more_than_vllm_has(tmp_path):
    with pytest.raises(ValueError, match="rank 513, and vLLM supports up to 512"):
        write({Q0: Factors(torch.ones(2, 513), torch.ones(513, 3))}, tmp_path / "x", rank="vllm")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_and_same_bytes(tmp_path, adapter, dtype):
    metadata = {"z": 1, "rounds": [3, 5], "a": "text: with 'quotes'"}
    for name in ("one", "two"):
        write(adapter, tmp_path / name, "b", dtype=dtype, metadata=metadata)
    for name in (WEIGHTS, CONFIG, CARD):
        one, two = ((tmp_path / folder / name).read_bytes() for folder in ("one", "two"))
        assert one == two
    values = load_file(tmp_path / "one" / WEIGHTS)
    assert {value.dtype for value in values.values()} == {dtype}
    assert '"rounds": [3, 5]' in (tmp_path / "one" / CARD).read_text()


def test_the_card_is_valid_yaml_whatever_the_names(tmp_path, adapter):
    yaml = pytest.importorskip("yaml")
    base = "odd: 'name' # \"x\" \\ é 😀"
    write(adapter, tmp_path / "out", base, metadata={"note": "two\nlines"})
    front = (tmp_path / "out" / CARD).read_text(encoding="utf-8").split("---\n")[1]
    assert yaml.safe_load(front)["base_model"] == base
    assert yaml.safe_load(front)["flexlora"] == {"note": "two\nlines"}
    with pytest.raises(ValueError, match="cannot be printed"):
        write(adapter, tmp_path / "bad", "a\x85b")
    with pytest.raises(ValueError, match="metadata is not valid JSON"):
        write(adapter, tmp_path / "bad", metadata={"x": math.nan})
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_replaces_only_an_adapter_and_only_with_replace(tmp_path, adapter):
    out = tmp_path / "out"
    out.mkdir()
    write(adapter, out)
    smaller = Adapter({Q0: adapter[Q0]})
    with pytest.raises(AdapterError, match=r"out is not empty.*--overwrite"):
        write(smaller, out)
    assert len(read(out).adapter) == 3
    write(smaller, out, replace=True)
    assert len(read(out).adapter) == 1
    (out / "optimizer.pt").write_text("precious")
    with pytest.raises(ValueError, match=r"also contains 'optimizer\.pt'"):
        write(adapter, out, replace=True)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="file is a file"):
        write(adapter, tmp_path / "file", replace=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "out"]


def test_a_failure_leaves_the_old_adapter(tmp_path, adapter, monkeypatch):
    write(adapter, tmp_path / "out")

    def full(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr("flexlora.peft_format.writing.save_file", full)
    with pytest.raises(OSError, match="disk full"):
        write(Adapter({Q0: adapter[Q0]}), tmp_path / "out", replace=True)
    assert len(read(tmp_path / "out").adapter) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_refuses_adapters_that_cannot_be_written(tmp_path, adapter):
    with pytest.raises(ValueError, match="has no modules"):
        write(Adapter({}), tmp_path / "x")
    with pytest.raises(ValueError, match=r"'a\.\.b' is not a module path"):
        write({"a..b": adapter[Q0]}, tmp_path / "x")
    with pytest.raises(ValueError, match=f"'{Q0}' are not finite in torch.float32"):
        write({Q0: Factors(torch.full((3, 2), math.inf), torch.ones(2, 5))}, tmp_path / "x")
    with pytest.raises(ValueError, match=r"not finite in torch\.float16"):
        large = Factors(torch.full((3, 2), 1e6), torch.ones(2, 5))
        write({Q0: large}, tmp_path / "x", dtype=torch.float16)
    with pytest.raises(ValueError, match=r"Cannot write torch\.int8"):
        write(adapter, tmp_path / "x", dtype=torch.int8)
    assert not list(tmp_path.iterdir())


def test_one_tensor_may_serve_two_modules(tmp_path):
    shared = factors(11, 7, 2, 4)
    write({Q0: shared, Q1: Factors(shared.B, shared.A)}, tmp_path / "out")
    assert torch.equal(read(tmp_path / "out").adapter[Q1].B, shared.B)


def test_rank_zero_is_written_as_an_update_of_zero(tmp_path):
    write({Q0: Factors(torch.zeros(11, 0), torch.zeros(0, 7))}, tmp_path / "out")
    assert read(tmp_path / "out").ranks == {Q0: 1}


def test_targets_are_last_names_only_if_no_layer_is_left_out():
    layers = [f"h.{layer}.{name}" for layer in range(3) for name in ("attn.q", "mlp.up")]
    assert targets(layers) == ["q", "up"]
    assert targets([*layers, "lm_head"]) == ["lm_head", "q", "up"]
    assert targets(layers[:-1]) == sorted(layers[:-1])
    assert targets(["h.1.attn.q"]) == ["h.1.attn.q"]
    assert targets(["h.0.attn.q"]) == ["q"]
    assert targets(["q"]) == ["q"]


@settings(deadline=None, max_examples=25)
@given(
    ranks=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    alpha=st.floats(-8, 8).filter(lambda value: abs(value) > 1e-3),
    rslora=st.booleans(),
)
def test_reading_then_writing_keeps_every_product(tmp_path_factory, ranks, alpha, rslora):
    folder = tmp_path_factory.mktemp("law")
    names = [f"h.{layer}.q_proj" for layer in range(len(ranks))]
    tensors = tensors_of(dict(zip(names, ranks, strict=True)))
    pattern = {f"h\\.{layer}\\..*": rank for layer, rank in enumerate(ranks)}
    store(folder / "in", tensors, r=9, rank_pattern=pattern, lora_alpha=alpha, use_rslora=rslora)
    before = read(folder / "in")
    write(before.adapter, folder / "out", rank="vllm")
    after = read(folder / "out")
    for name in names:
        torch.testing.assert_close(product(after.adapter[name]), product(before.adapter[name]))


# --- PEFT as the oracle --------------------------------------------------------------------


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
    write(whole, tmp_path / "out")
    model = peft.PeftModel.from_pretrained(llama(), tmp_path / "out")
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


def test_paths_may_be_strings(tmp_path, adapter):
    write(adapter, str(tmp_path / "out"))
    assert read(str(tmp_path / "out")).directory == tmp_path / "out"
    assert set(read(str(tmp_path / "out")).adapter) == set(adapter)


def test_the_last_adapter_of_a_run_folder_is_suggested(tmp_path, adapter):
    for number in (1, 2, 10):
        write(adapter, tmp_path / "rounds" / f"{number:05d}" / "adapter")
    with pytest.raises(AdapterError, match=r"perhaps .*rounds.00010.adapter\."):
        read(tmp_path)


def test_the_values_are_frozen(tmp_path):
    stored = read(store(tmp_path))
    with pytest.raises(dataclasses.FrozenInstanceError):
        stored.base_model = "other"
