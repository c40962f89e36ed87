"""What ``check`` says that PEFT drops and adds, compared with what PEFT does."""

import warnings

import peft
import pytest
import transformers

from flexlora.errors import AdapterError
from flexlora.peft_format import check, merge
from flexlora.peft_format.base_model import base_modules
from support.peft_oracle import (
    HIDDEN,
    VOCABULARY,
    WIDE,
    deltas,
    difference,
    gpt2,
    llama,
    rewrite,
    t5,
    trained,
)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


def modules(keys):
    """The modules of keys such as ``base_model.model.X.lora_A.default.weight``."""
    names = {key.removeprefix("base_model.model.").partition(".lora_")[0] for key in keys}
    return sorted(names)


def by_peft(model, folder):
    """The modules whose tensors PEFT drops, and those that it adapts without tensors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.PeftConfig.from_pretrained(folder)
        adapted = peft.get_peft_model(model, config)
        result = adapted.load_adapter(folder, "default")
    missing = [key for key in result.missing_keys if ".lora_" in key]
    return modules(result.unexpected_keys), modules(missing)


def test_what_is_written_is_read(tmp_path):
    base = llama()
    base.config.save_pretrained(tmp_path / "base")
    trained(base, tmp_path / "one", 1, r=2, target_modules=["q_proj", "lm_head", "embed_tokens"])
    report = check(tmp_path / "one", tmp_path / "base")
    assert report.verdicts[0].outcome == "reads"
    assert by_peft(base, tmp_path / "one") == ([], []) == ([*report.dropped], [*report.added])


CHANGES = [
    ("names that also choose other layers", {"layers_to_transform": None}, None),
    ("a name that nothing was trained for", {"target_modules": ["q_proj", "up_proj"]}, None),
    (
        "a regular expression",
        {"target_modules": r".*(q_proj|lm_head)", "layers_to_transform": None},
        None,
    ),
    ("a layer that is not chosen", {"layers_to_transform": [0]}, None),
    ("an exclusion", {"exclude_modules": ["layers.1.self_attn.q_proj"]}, None),
    (
        "paths that the base model does not have",
        {},
        lambda name: name.replace("model.model.layers", "model.decoder.layers"),
    ),
    ("an adapter's name in the tensors' names", {}, lambda n: n.replace(".weight", ".lab.weight")),
]


@pytest.mark.parametrize(("config", "names"), [each[1:] for each in CHANGES], ids=lambda _: "")
def test_what_is_dropped_and_added_is_what_peft_does(tmp_path, config, names):
    base = llama(layers=4)
    base.config.save_pretrained(tmp_path / "base")
    one = trained(
        base, tmp_path / "one", 1, r=2, target_modules=["q_proj"], layers_to_transform=[0, 1]
    )
    rewrite(one, names, **config)
    report = check(one, tmp_path / "base")
    dropped, added = by_peft(base, one)
    assert report.verdicts[0].outcome == "misreads" and not report.alike
    assert sorted(report.dropped) == dropped
    assert sorted(report.added) == added
    assert dropped or added


def test_without_a_base_model_the_files_show_names_without_tensors(tmp_path):
    one = trained(llama(), tmp_path / "one", 1, r=2, target_modules=["q_proj"])
    rewrite(one, target_modules=["q_proj", "embed_tokens", "lm_head"])
    report = check(one)
    assert report.added == ("embed_tokens", "lm_head")
    (peft_line,) = [line for line in report.lines() if line.startswith("PEFT: ")]
    assert "misreads it: target_modules names embed_tokens, lm_head" in peft_line
    assert "flexlora merge" in peft_line and not report.alike


def test_names_that_the_base_model_does_not_have_do_no_harm(tmp_path):
    base = llama()
    base.config.save_pretrained(tmp_path / "base")
    one = trained(base, tmp_path / "one", 1, r=2, target_modules=["q_proj"])
    rewrite(one, target_modules=["q_proj", "c_attn"])
    assert check(one, tmp_path / "base").verdicts[0].outcome == "reads"
    assert check(one).added == ("c_attn",)


def test_what_peft_refuses_to_load(tmp_path):
    base = llama()
    base.config.save_pretrained(tmp_path / "base")
    one = trained(base, tmp_path / "one", 1, r=2, target_modules=["q_proj"])
    rewrite(one, target_modules=["q_proj", "input_layernorm"])
    with pytest.raises(ValueError, match="is not supported"):
        by_peft(llama(), one)
    verdict = check(one, tmp_path / "base").verdicts[0]
    assert verdict.outcome == "refuses" and "LlamaRMSNorm it cannot adapt" in verdict.why
    rewrite(one, target_modules=["q_proj"])
    wider = llama(hidden_size=18)
    wider.config.save_pretrained(tmp_path / "wider")
    with pytest.raises(RuntimeError, match="size mismatch"):
        by_peft(wider, one)
    verdict = check(one, tmp_path / "wider").verdicts[0]
    assert verdict.outcome == "refuses"
    assert "(12, 12) (out, in), and the base model has (18, 18)" in verdict.why


REFUSED = [
    {"r": "2"},
    {"r": 2.0},
    {"rank_pattern": {"v_proj": 0}, "target_modules": ["q_proj", "v_proj"]},
    {"target_modules": ".*q_proj", "layers_to_transform": [0, 1]},
    {"layers_pattern": "layers"},
]


@pytest.mark.parametrize("config", REFUSED)
def test_settings_that_peft_refuses(tmp_path, config):
    one = trained(llama(), tmp_path / "one", 1, r=2, target_modules=["q_proj"])
    rewrite(one, **config)
    with pytest.raises((TypeError, ValueError)):
        by_peft(llama(), one)
    assert check(one).verdicts[0].outcome == "refuses"


def test_patterns_and_layers_without_effect_are_said(tmp_path):
    one = trained(
        llama(), tmp_path / "one", 1, r=2, target_modules=["q_proj"], layers_to_transform=[0]
    )
    rewrite(
        one,
        rank_pattern={"k_proj": 5},
        alpha_pattern={"q_proj": 16, "up": 3},
        layers_to_transform=[0, 7],
    )
    assert check(one).warnings[-3:] == (
        "rank_pattern has entries that match no module of the adapter, and so no effect: 'k_proj'.",
        "alpha_pattern has entries that match no module of the adapter, and so no effect: 'up'.",
        "layers_to_transform names layers of which there are no tensors: 7.",
    )


def test_a_regular_expression_that_is_not_evaluated_is_said(tmp_path):
    one = trained(llama(), tmp_path / "one", 1, r=2, target_modules=["q_proj"])
    rewrite(one, target_modules=r"(?!.*vision).*q_proj")
    report = check(one)
    assert report.verdicts[0].outcome == "reads"
    assert "with --base to see what PEFT would drop or add" in report.notes[0]


def test_the_modules_of_other_classes(tmp_path):
    for name, make, shape in (
        ("transformer.h.0.attn.c_attn", gpt2, (3 * HIDDEN, HIDDEN)),
        ("encoder.block.0.layer.0.SelfAttention.q", t5, (12, HIDDEN)),
        ("shared", t5, (HIDDEN, VOCABULARY)),
        ("model.layers.0.mlp.up_proj", llama, (WIDE, HIDDEN)),
    ):
        folder = tmp_path / make.__name__
        make().config.save_pretrained(folder)
        task = "SEQ_2_SEQ_LM" if make is t5 else None
        assert base_modules(folder, [name], task).shapes[name] == shape


def llava():
    """A tiny multimodal model, whose vision tower has modules of the same names and more layers."""
    vision = transformers.CLIPVisionConfig(
        hidden_size=8,
        intermediate_size=10,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=4,
        patch_size=2,
    )
    config = transformers.LlavaConfig(text_config=llama().config, vision_config=vision)
    return transformers.LlavaForConditionalGeneration(config)


Q = "model.language_model.layers.0.self_attn.q_proj"


def test_the_class_of_a_multimodal_model_is_that_of_the_adapter(tmp_path):
    llava().config.save_pretrained(tmp_path)
    base = base_modules(tmp_path, [Q])
    assert base.shapes[Q] == (HIDDEN, HIDDEN)
    assert any("vision_tower" in module for module in base.shapes)


def test_the_text_paths_of_a_multimodal_model_are_explained(tmp_path):
    llava().config.save_pretrained(tmp_path / "base")
    one = trained(llama(), tmp_path / "one", 1, r=2, target_modules=["q_proj"])
    why = check(one, tmp_path / "base").verdicts[0].why
    assert f"it has {Q} in place of model.layers" in why


@pytest.mark.parametrize(
    "names", [["q_proj"], r".*language_model.*q_proj", [Q], [Q.replace("model.lang", "x.lang")]]
)
def test_paths_of_older_transformers_are_converted_as_peft_does(tmp_path, names):
    """PEFT renames the tensors, but takes the names in target_modules as they are."""
    base = llava()
    base.config.save_pretrained(tmp_path / "base")
    one = trained(base, tmp_path / "one", 1, r=2, target_modules=r".*language_model.*q_proj")
    rewrite(
        one,
        lambda name: name.replace("model.language_model.", "language_model.model."),
        target_modules=names,
    )
    report = check(one, tmp_path / "base")
    if report.verdicts[0].outcome == "refuses":
        with pytest.raises(ValueError, match="not found in the base model"):
            by_peft(base, one)
    else:
        dropped, added = by_peft(base, one)
        assert sorted(report.added) == added
        assert sorted(base_path(each) for each in report.dropped) == sorted(dropped)


def base_path(module):
    return module.replace("language_model.model.", "model.language_model.")


@pytest.mark.parametrize("targets", [r".*language_model.*q_proj", ["q_proj", "out_proj"]])
def test_a_merge_of_older_multimodal_adapters_loads_in_the_present_model(tmp_path, targets):
    base = llava()
    base.config.save_pretrained(tmp_path / "base")
    one = trained(base, tmp_path / "one", 1, r=2, target_modules=targets)
    expected = deltas(base, one)
    rewrite(one, lambda name: name.replace("model.language_model.", "language_model.model."))
    merge([one], tmp_path / "out")
    assert by_peft(llava(), tmp_path / "out") == ([], [])
    assert difference(deltas(base, tmp_path / "out"), expected) < 1e-6
    assert check(tmp_path / "out", tmp_path / "base").verdicts[0].outcome == "reads"
    assert check(tmp_path / "out").verdicts[0].outcome == "reads"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"config\.json is missing; give --base a folder"),
        ("{", "is not the config of a model that transformers knows"),
        ('{"model_type": "unheard-of"}', "is not the config of a model that transformers knows"),
        ('{"model_type": "clip_vision_model"}', "has no model of the type 'clip_vision_model'"),
    ],
)
def test_a_base_model_that_is_none(tmp_path, content, message):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    one = trained(llama(), tmp_path / "one", 1, r=2, target_modules=["q_proj"])
    with pytest.raises(AdapterError, match=message):
        check(one, tmp_path)
