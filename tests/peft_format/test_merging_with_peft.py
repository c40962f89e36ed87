"""PEFT as the oracle of merging: its own deltas in float64, weighted."""

import json

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from flexlora.errors import AdapterError
from flexlora.peft_format import CONFIG, WEIGHTS, check, merge, read
from flexlora.peft_format.agreement import TASK_TYPES
from support.peft_oracle import (
    deltas,
    difference,
    gpt2,
    llama,
    loaded,
    rewrite,
    t5,
    trained,
    weighted,
)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

ROUNDING = 1e-6
"""Files are in float32."""


def config_of(folder):
    return json.loads((folder / CONFIG).read_text())


CASES = {
    "linear": (llama, {"target_modules": ["q_proj", "v_proj"]}),
    "head": (llama, {"target_modules": ["q_proj", "lm_head"]}),
    "embedding": (llama, {"target_modules": ["q_proj", "embed_tokens"]}),
    "first layers": (
        lambda: llama(layers=4),
        {"target_modules": ["q_proj"], "layers_to_transform": [0, 1]},
    ),
    "regular expression": (llama, {"target_modules": r".*layers\.1\..*(q|up)_proj"}),
    "exclusion": (
        llama,
        {"target_modules": ["q_proj", "down_proj"], "exclude_modules": ["layers.1.mlp.down_proj"]},
    ),
    "all linear layers": (llama, {"target_modules": "all-linear", "use_rslora": True}),
    "Conv1D": (gpt2, {"target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True}),
    "T5": (t5, {"target_modules": ["q", "v"], "task_type": "SEQ_2_SEQ_LM"}),
    "patterns": (
        llama,
        {
            "target_modules": ["q_proj", "up_proj"],
            "rank_pattern": {r"layers\.1\..*q_proj": 5},
            "alpha_pattern": {"up_proj": 11},
        },
    ),
}


@pytest.mark.parametrize(
    ("case", "copies"), [*((case, False) for case in CASES), ("head", True), ("embedding", True)]
)
def test_the_mean_is_that_of_pefts_deltas(tmp_path, case, copies):
    """And PEFT loads the result with no module added and none left without values."""
    make, settings = CASES[case]
    base = make()
    one = trained(base, tmp_path / "one", 1, copies, r=2, lora_alpha=6, **settings)
    two = trained(base, tmp_path / "two", 2, copies, r=3, lora_alpha=5, **settings)
    merge([one, two], tmp_path / "out", weights=[3, 1])
    expected = weighted((0.75, deltas(base, one)), (0.25, deltas(base, two)))
    assert difference(deltas(base, tmp_path / "out"), expected) < ROUNDING
    config = config_of(tmp_path / "out")
    assert config["task_type"] == settings.get("task_type")
    assert config["fan_in_fan_out"] == settings.get("fan_in_fan_out", False)
    for option in ({}, {"low_cpu_mem_usage": True}):
        model, missing = loaded(base, tmp_path / "out", **option)
        assert not missing
        assert not any(value.is_meta for value in model.parameters())


@pytest.mark.parametrize("name", ["embed_tokens", "lm_head"])
def test_an_adapter_of_tied_weights_is_merged_with_both(tmp_path, name):
    """PEFT stores the factors of both modules, which are each other's, and names one."""
    base = llama(tie_word_embeddings=True)
    settings = {"target_modules": ["q_proj", name], "ensure_weight_tying": True}
    one = trained(base, tmp_path / "one", 1, r=2, **settings)
    two = trained(base, tmp_path / "two", 2, r=3, **settings)
    for folder in (one, two):
        values, start = load_file(folder / WEIGHTS), "base_model.model."
        for half, other in ("AB", "BA"):
            tied = values[f"{start}model.embed_tokens.lora_embedding_{other}"].T.contiguous()
            values[f"{start}lm_head.lora_{half}.weight"] = tied
        save_file(values, folder / WEIGHTS)
    merge([one, two], tmp_path / "out", weights=[3, 1])
    expected = weighted((0.75, deltas(base, one)), (0.25, deltas(base, two)))
    assert len(expected) == 4
    assert difference(deltas(base, tmp_path / "out"), expected) < ROUNDING
    base.config.save_pretrained(tmp_path / "base")
    assert check(one, tmp_path / "base").verdicts[0].outcome == "reads"
    assert check(tmp_path / "out", tmp_path / "base").verdicts[0].outcome == "reads"


def test_short_names_are_kept_where_every_adapter_trained_all_that_they_choose(tmp_path):
    base = llama()
    one = trained(base, tmp_path / "one", 1, r=2, target_modules=["q_proj"])
    two = trained(base, tmp_path / "two", 2, r=3, target_modules=["self_attn.v_proj"])
    merge([one, two], tmp_path / "out")
    assert config_of(tmp_path / "out")["target_modules"] == ["q_proj", "self_attn.v_proj"]
    _, missing = loaded(base, tmp_path / "out")
    assert not missing


def test_names_without_tensors_are_not_written(tmp_path):
    base = llama()
    one = trained(base, tmp_path / "one", 1, r=2, target_modules=["q_proj"])
    rewrite(one, target_modules=["q_proj", "embed_tokens", "lm_head"])
    merge([one], tmp_path / "out")
    assert config_of(tmp_path / "out")["target_modules"] == ["q_proj"]


WRAPPED = {
    "in memory": lambda name: (
        name.replace(".weight", ".default.weight")
        .replace("embedding_A", "embedding_A.default")
        .replace("embedding_B", "embedding_B.default")
    ),
    "another adapter's name": lambda name: (
        name.replace(".weight", ".lab.weight")
        .replace("embedding_A", "embedding_A.lab")
        .replace("embedding_B", "embedding_B.lab")
    ),
    "torch.compile": lambda name: f"_orig_mod.{name}",
    "torch.compile of the base": lambda name: name.replace("model.model", "model._orig_mod.model"),
    "FSDP": lambda name: name.replace("model.model", "model._fsdp_wrapped_module.model").replace(
        "self_attn", "_fsdp_wrapped_module._checkpoint_wrapped_module.self_attn"
    ),
    "Lightning": lambda name: f"model._orig_mod.{name}",
    "DDP": lambda name: f"module.{name}",
    "DeepSpeed inside": lambda name: name.replace("base_model.model.", "base_model.model.module."),
    "no prefix": lambda name: name.removeprefix("base_model.model."),
    "prefix twice": lambda name: f"base_model.model.{name}",
}


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_what_wrappers_add_to_names_is_left_out_and_said(tmp_path, wrapper):
    base = llama()
    targets = ["q_proj", "embed_tokens"]
    one = trained(base, tmp_path / "one", 1, r=2, lora_alpha=6, target_modules=targets)
    expected = deltas(base, one)
    assert len(expected) == 3
    rewrite(one, WRAPPED[wrapper])
    result = merge([one], tmp_path / "out")
    assert difference(deltas(base, tmp_path / "out"), expected) < ROUNDING
    assert len(result.notes) >= 1
    # Whether PEFT itself reads the file is what it does, and what check says.
    lost = difference(deltas(base, one), expected) > 0.5
    assert check(one).verdicts[0].outcome == ("misreads" if lost else "reads")
    assert check(tmp_path / "out").verdicts[0].outcome == "reads"
    assert lost == (wrapper != "in memory")


def test_adapters_of_several_names_are_refused(tmp_path):
    base = llama()
    one = trained(base, tmp_path / "one", 1, r=2, target_modules=["q_proj"])
    rewrite(one, lambda name: name.replace(".weight", f".{'ab'['layers.1' in name]}.weight"))
    with pytest.raises(AdapterError, match=r"several adapters \('a', 'b'\).*selected_adapters"):
        merge([one], tmp_path / "out")


def test_names_that_become_the_same_are_refused(tmp_path):
    base = llama()
    one = trained(base, tmp_path / "one", 1, r=2, target_modules=["q_proj"])
    values = load_file(one / WEIGHTS)
    name = next(iter(values))
    save_file(values | {f"_orig_mod.{name}": values[name] + 1}, one / WEIGHTS)
    with pytest.raises(AdapterError, match="without what wrappers add"):
        merge([one], tmp_path / "out")


def test_shards_are_read_as_one_file(tmp_path):
    base = llama()
    one = trained(base, tmp_path / "one", 1, r=2, target_modules=["q_proj", "down_proj"])
    expected = deltas(base, one)
    values = load_file(one / WEIGHTS)
    names = sorted(values)
    shards = {f"adapter_model-0000{n}-of-00002.safetensors": names[n - 1 :: 2] for n in (1, 2)}
    for shard, inside in shards.items():
        save_file({name: values[name] for name in inside}, one / shard)
    (one / WEIGHTS).unlink()
    index = {"metadata": {}, "weight_map": {n: s for s, inside in shards.items() for n in inside}}
    (one / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    report = check(one)
    assert [v.outcome for v in report.verdicts] == ["refuses"] * 4
    merge([one], tmp_path / "out")
    assert difference(deltas(base, tmp_path / "out"), expected) < ROUNDING
    (one / f"{WEIGHTS}.index.json").unlink()
    merge([one], tmp_path / "out", replace=True)
    assert difference(deltas(base, tmp_path / "out"), expected) < ROUNDING
    (one / "adapter_model-00002-of-00002.safetensors").unlink()
    with pytest.raises(AdapterError, match=r"00002-of-00002\.safetensors' is missing"):
        merge([one], tmp_path / "out", replace=True)


@pytest.mark.parametrize(
    "text", ["", "{}", '{"weight_map": {"a": "../../x.safetensors"}}', '{"weight_map": {"a": 3}}']
)
def test_an_index_of_shards_is_not_trusted(tmp_path, text):
    one = trained(llama(), tmp_path / "one", 1, r=2, target_modules=["q_proj"])
    (one / WEIGHTS).rename(one / "adapter_model-00001-of-00001.safetensors")
    (one / f"{WEIGHTS}.index.json").write_text(text)
    with pytest.raises(AdapterError, match="is not a valid index of shards"):
        merge([one], tmp_path / "out")


def test_copies_of_base_weights_must_agree(tmp_path):
    settings = {"r": 2, "target_modules": ["lm_head"], "copies": True}
    base = llama()
    one = trained(base, tmp_path / "one", 1, **settings)
    two = trained(base.bfloat16(), tmp_path / "two", 2, **settings)
    result = merge([one, two], tmp_path / "out")  # the same base model in another precision
    assert "which PEFT saved beside the factors" in result.notes[0]
    assert not any("base_layer" in name for name in load_file(tmp_path / "out" / WEIGHTS))
    with torch.no_grad():
        base.lm_head.weight[3, 2] += 1
    other = trained(base, tmp_path / "other", 3, **settings)
    with pytest.raises(AdapterError, match=r"different base weights of 'lm_head'"):
        merge([one, other], tmp_path / "out", replace=True)
    values = load_file(one / WEIGHTS)
    name = "base_model.model.lm_head.base_layer.weight"
    save_file(values | {name: torch.cat([values[name]] * 2)}, one / WEIGHTS)
    with pytest.raises(AdapterError, match=r"the vocabulary was resized"):
        merge([one], tmp_path / "out", replace=True)


PATHS = ["model.language_model.", "language_model.model.", "", "model.text_model."]


@pytest.mark.parametrize("start", PATHS)
def test_the_same_layers_under_other_paths_are_one(tmp_path, start):
    base = llama()
    settings = {"target_modules": ["q_proj", "down_proj"], "lora_alpha": 5}
    one = trained(base, tmp_path / "one", 1, r=2, **settings)
    two = trained(base, tmp_path / "two", 2, r=3, **settings)
    expected = weighted((0.5, deltas(base, one)), (0.5, deltas(base, two)))
    rewrite(two, lambda name: name.replace("base_model.model.model.", f"base_model.model.{start}"))
    result = merge([one, two], tmp_path / "out")
    assert difference(deltas(base, tmp_path / "out"), expected) < ROUNDING
    assert not any(facts.absent_from for facts in result)
    (note,) = result.notes
    assert f"4 of 4 modules of {two} are the same layers under other paths" in note
    names = {facts.module for facts in merge([two, one], tmp_path / "other")}
    assert all(name.startswith(f"{start}layers.") for name in names)


def test_a_vision_tower_is_not_the_language_model(tmp_path):
    base = llama()
    one = trained(base, tmp_path / "one", 1, r=2, target_modules=["q_proj"])
    two = trained(base, tmp_path / "two", 2, r=2, target_modules=["q_proj"])
    rewrite(two, lambda name: name.replace("model.model.layers", "model.vision_tower.layers"))
    result = merge([one, two], tmp_path / "out")
    assert len(result) == 4
    assert "No module is in all of them." in result.notes[0]


@pytest.mark.parametrize(("absent", "share"), [("zero", 0.25), ("skip", 1.0)])
def test_a_module_that_one_adapter_lacks_counts_by_the_rule(tmp_path, absent, share):
    base = llama()
    one = trained(base, tmp_path / "one", 1, r=2, target_modules=["q_proj"])
    two = trained(base, tmp_path / "two", 2, r=3, target_modules=["q_proj", "up_proj"])
    result = merge([one, two], tmp_path / "out", weights=[3, 1], absent=absent)
    first, second = deltas(base, one), deltas(base, two)
    q = {name: value for name, value in second.items() if "q_proj" in name}
    up = {name: value for name, value in second.items() if "up_proj" in name}
    expected = weighted((0.75, first), (0.25, q), (share, up))
    assert difference(deltas(base, tmp_path / "out"), expected) < ROUNDING
    assert f"--absent {'skip' if absent == 'zero' else absent}" in result.notes[0]
    with pytest.raises(AdapterError, match="absent is 'mean'"):
        merge([one, two], tmp_path / "other", absent="mean")


def test_weights_can_be_summed_and_undone(tmp_path):
    base = llama()
    one = trained(base, tmp_path / "one", 1, r=2, target_modules=["q_proj"])
    two = trained(base, tmp_path / "two", 2, r=3, target_modules=["q_proj"])
    with pytest.raises(AdapterError, match=r"positive and finite, got -0.5.*--sum"):
        merge([one, two], tmp_path / "sum", weights=[2, -0.5])
    merge([one, two], tmp_path / "sum", weights=[2, -0.5], sum_weights=True)
    expected = weighted((2, deltas(base, one)), (-0.5, deltas(base, two)))
    assert difference(deltas(base, tmp_path / "sum"), expected) < ROUNDING
    merge([tmp_path / "sum", two], tmp_path / "back", weights=[0.5, 0.25], sum_weights=True)
    assert difference(deltas(base, tmp_path / "back"), deltas(base, one)) < 10 * ROUNDING
    result = merge([one, one], tmp_path / "none", weights=[1, -1], sum_weights=True)
    assert [facts.rank for facts in result] == [1, 1]
    assert all(not delta.any() for delta in deltas(base, tmp_path / "none").values())
    # The difference of adapters that nearly agree is not lost to rounding.
    near = trained(base, tmp_path / "near", 1, r=2, target_modules=["q_proj"])
    values = load_file(near / WEIGHTS)
    save_file({name: value * (1 + 2**-12) for name, value in values.items()}, near / WEIGHTS)
    merge([near, one], tmp_path / "small", weights=[1, -1], sum_weights=True)
    expected = weighted((1, deltas(base, near)), (-1, deltas(base, one)))
    assert difference(deltas(base, tmp_path / "small"), expected) < ROUNDING
    with pytest.raises(AdapterError, match="finite and not zero, got 0"):
        merge([one, two], tmp_path / "other", weights=[1, 0], sum_weights=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_precision_of_the_file(tmp_path, dtype):
    base = llama()
    one = trained(base, tmp_path / "one", 1, r=2, target_modules=["q_proj"])
    merge([one], tmp_path / "out", dtype=dtype)
    assert {value.dtype for value in load_file(tmp_path / "out" / WEIGHTS).values()} == {dtype}
    tolerance = 4 * torch.finfo(dtype).eps
    assert difference(deltas(base, tmp_path / "out"), deltas(base, one)) < tolerance


def test_the_class_that_automodels_load_is_kept_if_transformers_has_it(tmp_path):
    one = trained(llama(), tmp_path / "one", 1, r=2, target_modules=["q_proj"])
    two = trained(llama(), tmp_path / "two", 2, r=2, target_modules=["q_proj"])
    merge([one, two], tmp_path / "out")
    mapping = config_of(one)["auto_mapping"]
    assert mapping["base_model_class"] == "LlamaForCausalLM"
    assert config_of(tmp_path / "out")["auto_mapping"] == mapping
    for folder in (one, two):
        rewrite(folder, auto_mapping={"base_model_class": "X", "parent_library": "other.code"})
    merge([one, two], tmp_path / "out", replace=True)
    assert config_of(tmp_path / "out")["auto_mapping"] is None
    assert transformers.LlamaForCausalLM.__name__ == mapping["base_model_class"]


DIFFER = [
    ({"task_type": "CAUSAL_LM"}, {"task_type": "SEQ_CLS"}, "task_type", "--task-type"),
    ({"revision": "v1"}, {"revision": "v2"}, "revision", "--revision"),
    ({"revision": "v1"}, {"revision": None}, "revision", "--revision"),
    (
        {"base_model_name_or_path": "a/b"},
        {"base_model_name_or_path": "a/c"},
        "base",
        "--base",
    ),
]


@pytest.mark.parametrize(("first", "second", "name", "option"), DIFFER)
def test_what_differs_is_asked_for(tmp_path, first, second, name, option):
    one = trained(llama(), tmp_path / "one", 1, r=2, target_modules=["q_proj"])
    two = trained(llama(), tmp_path / "two", 2, r=2, target_modules=["q_proj"])
    rewrite(one, **first)
    rewrite(two, **second)
    with pytest.raises(AdapterError, match=rf"{option}\.") as caught:
        merge([one, two], tmp_path / "out")
    assert str(one) in str(caught.value) and str(two) in str(caught.value)
    given = "TOKEN_CLS" if name == "task_type" else "given"
    merge([one, two], tmp_path / "out", **{name: given})
    assert given in config_of(tmp_path / "out").values()


def test_a_task_type_is_one_of_pefts(tmp_path):
    assert {*TASK_TYPES} == {*peft.TaskType}
    one = trained(llama(), tmp_path / "one", 1, r=2, target_modules=["q_proj"])
    with pytest.raises(AdapterError, match=r"The task type is 'causal'; give one of CAUSAL_LM, "):
        merge([one], tmp_path / "out", task_type="causal")


def test_a_note_of_several_adapters_is_said_once(tmp_path):
    folders = [
        trained(llama(), tmp_path / str(seed), seed, r=2, target_modules=["q_proj"])
        for seed in range(3)
    ]
    for folder in folders:
        rewrite(folder, trained_with="x")
    result = merge(folders, tmp_path / "out")
    (note,) = result.notes
    assert note.startswith(f"{folders[0]} and 2 more: adapter_config.json has settings")


def test_what_is_the_same_is_kept_and_what_some_leave_out_is_said(tmp_path):
    one = trained(llama(), tmp_path / "one", 1, r=2, target_modules=["q_proj"])
    two = trained(llama(), tmp_path / "two", 2, r=2, target_modules=["q_proj"])
    rewrite(one, revision="v1", task_type="CAUSAL_LM", base_model_name_or_path="a/b")
    rewrite(two, revision="v1", task_type=None, base_model_name_or_path=None)
    result = merge([one, two], tmp_path / "out")
    config = config_of(tmp_path / "out")
    assert (config["revision"], config["task_type"]) == ("v1", "CAUSAL_LM")
    assert config["base_model_name_or_path"] == "a/b"
    assert result.notes == (
        f"1 of 2 adapters name no base model, such as {two}; the result has the one of the others, "
        f"'a/b'.",
        f"1 of 2 adapters name no task type, such as {two}; the result has the one of the others, "
        f"'CAUSAL_LM'.",
    )


def test_a_linear_layer_is_not_an_embedding(tmp_path):
    base = llama()
    one = trained(base, tmp_path / "one", 1, r=2, target_modules=["embed_tokens"])
    two = trained(base, tmp_path / "two", 2, r=2, target_modules=["lm_head"])
    names = {"lm_head.lora_A.weight": "A", "lm_head.lora_B.weight": "B"}
    values = load_file(two / WEIGHTS)
    A, B = (values[f"base_model.model.{name}"] for name in names)
    start = "base_model.model.model.embed_tokens.lora_"
    # A linear layer of the embedding's own shape (out, in) = (12, 37).
    save_file(
        {f"{start}A.weight": B.T.contiguous(), f"{start}B.weight": A.T.contiguous()}, two / WEIGHTS
    )
    rewrite(two, target_modules=["embed_tokens"])
    with pytest.raises(AdapterError, match=r"\(12, 37\) of an embedding"):
        merge([one, two], tmp_path / "out")


def classifier(**settings):
    """A tiny Llama with a classifier, whose head PEFT trains and saves as a whole."""
    config = llama(num_labels=3, pad_token_id=0, **settings).config
    torch.manual_seed(6)
    return transformers.LlamaForSequenceClassification(config).double()


def trained_classifier(folder, seed, **settings):
    base = classifier()
    trained(base, folder, seed, task_type="SEQ_CLS", target_modules=["q_proj"], **settings)
    values = load_file(folder / WEIGHTS)
    head = matrix_of(3, 12, seed)
    save_file(values | {"base_model.model.score.weight": head}, folder / WEIGHTS)
    return folder


def matrix_of(rows, columns, seed):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def head_of(folder):
    model, missing = loaded(classifier(), folder)
    assert not missing
    return model.base_model.model.score.modules_to_save["default"].weight.double()


def test_whole_modules_that_all_adapters_have_are_averaged(tmp_path):
    one = trained_classifier(tmp_path / "one", 1, r=2)
    two = trained_classifier(tmp_path / "two", 2, r=3)
    result = merge([one, two], tmp_path / "out", weights=[3, 1], rank=4)
    expected = 0.75 * head_of(one) + 0.25 * head_of(two)
    torch.testing.assert_close(head_of(tmp_path / "out"), expected, rtol=ROUNDING, atol=1e-7)
    assert config_of(tmp_path / "out")["modules_to_save"] == ["score"]
    assert "The whole tensors of score (modules_to_save) are averaged" in result.notes[-1]
    report = check(tmp_path / "out")
    outcomes = {verdict.consumer: verdict.outcome for verdict in report.verdicts}
    assert outcomes == {"PEFT": "reads", "vLLM": "refuses", "llama.cpp": "refuses"}
    classifier().config.save_pretrained(tmp_path / "base")
    assert check(tmp_path / "out", tmp_path / "base").verdicts[0].outcome == "reads"
    with pytest.raises(AdapterError, match="modules_to_save is"):
        read(tmp_path / "out")  # to be evaluated, it would have to be applied


def test_whole_modules_that_cannot_be_averaged(tmp_path):
    one = trained_classifier(tmp_path / "one", 1, r=2)
    two = trained_classifier(tmp_path / "two", 2, r=3)
    with pytest.raises(AdapterError, match=r"weights that sum to 2 is not defined; leave --sum"):
        merge([one, two], tmp_path / "out", weights=[1, 1], sum_weights=True)
    plain = trained(classifier(), tmp_path / "plain", 3, r=2, target_modules=["q_proj"])
    for pair in ([one, plain], [plain, one]):
        with pytest.raises(AdapterError, match=rf"{one} has the whole tensor 'score.weight'"):
            merge(pair, tmp_path / "out", base="tiny/base")
    values = load_file(two / WEIGHTS)
    save_file(values | {"base_model.model.score.weight": torch.zeros(4, 12)}, two / WEIGHTS)
    with pytest.raises(AdapterError, match=r"has the shape \[4, 12\] in"):
        merge([one, two], tmp_path / "out")
    memory = {"base_model.model.score.modules_to_save.default.weight": torch.zeros(3, 12)}
    save_file(values | memory, two / WEIGHTS)
    with pytest.raises(AdapterError, match="is a whole tensor"):
        merge([one, two], tmp_path / "out")
    bad = {"base_model.model.score.weight": torch.full((3, 12), torch.nan)}
    save_file(values | bad, two / WEIGHTS)
    with pytest.raises(AdapterError, match=r"'score.weight' contains NaN"):
        merge([one, two], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tied_whole_modules_are_refused(tmp_path):
    one = trained_classifier(tmp_path / "one", 1, r=2)
    rewrite(one, ensure_weight_tying=True)
    with pytest.raises(AdapterError, match="ensure_weight_tying"):
        merge([one], tmp_path / "out")


def test_a_whole_module_without_tensors_is_what_peft_refuses(tmp_path):
    one = trained(llama(), tmp_path / "one", 1, r=2, target_modules=["q_proj"])
    rewrite(one, modules_to_save=["lm_head"])
    with pytest.raises(KeyError):
        loaded(llama(), one)
    verdict = check(one).verdicts[0]
    assert verdict.outcome == "refuses" and "no tensors of lm_head" in verdict.why
