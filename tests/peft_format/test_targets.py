"""Which modules PEFT chooses, compared with PEFT's own rule, and how modules are named."""

import itertools

import peft
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners.tuners_utils import check_target_module_exists

from flexlora.peft_format.targets import Targets, common_targets, targets

MODULES = [
    f"{start}layers.{layer}.{name}"
    for start, layer, name in itertools.product(
        ("model.", "model.vision_tower.", ""), range(3), ("self_attn.q_proj", "mlp.up_proj", "q")
    )
] + ["lm_head", "model.embed_tokens", "model.h.1.experts.2.up_proj"]


def chosen(**config):
    return Targets.of(config, "place").chosen(MODULES)


CONFIGS = [
    {"target_modules": ["q_proj"]},
    {"target_modules": ["layers.1.self_attn.q_proj"]},
    {"target_modules": ["lm_head", "q"]},
    {"target_modules": ["q_proj"], "layers_to_transform": [1, 2]},
    {"target_modules": ["q_proj", "model.layers.0.mlp.up_proj"], "layers_to_transform": 1},
    {"target_modules": ["up_proj"], "layers_to_transform": [1], "layers_pattern": "h"},
    {"target_modules": ["up_proj"], "layers_to_transform": [2], "layers_pattern": ["experts"]},
    {"target_modules": ["q_proj", "lm_head"], "layers_to_transform": [0]},
    {"target_modules": ["q_proj"], "layers_to_transform": []},
    {"target_modules": ["q_proj"], "exclude_modules": ["vision_tower.layers.0.self_attn.q_proj"]},
    {"target_modules": ["q_proj"], "exclude_modules": r".*vision.*"},
    {"target_modules": r"model\.layers\..*(q|up)_proj"},
    {"target_modules": r"model.*", "exclude_modules": ["up_proj"]},
    {"target_modules": "q_proj"},
]


@pytest.mark.parametrize("config", CONFIGS)
def test_the_choice_is_that_of_peft(config):
    lora = peft.LoraConfig(**config)
    expected = {module for module in MODULES if check_target_module_exists(lora, module)}
    assert chosen(**config) == expected


@settings(deadline=None, max_examples=60)
@given(
    names=st.lists(st.sampled_from(["q_proj", "up_proj", "q", *MODULES]), min_size=1, max_size=4),
    layers=st.none() | st.integers(0, 2) | st.lists(st.integers(0, 2), max_size=2),
    exclude=st.none() | st.lists(st.sampled_from(["q_proj", *MODULES]), max_size=2),
)
def test_any_choice_by_names_is_that_of_peft(names, layers, exclude):
    config = {"target_modules": names, "layers_to_transform": layers, "exclude_modules": exclude}
    lora = peft.LoraConfig(**config)
    expected = {module for module in MODULES if check_target_module_exists(lora, module)}
    assert chosen(**config) == expected


@pytest.mark.parametrize("pattern", ["all-linear", r"(?!.*vision).*q_proj", "(a+)+b", None])
def test_what_cannot_be_evaluated_is_not_guessed(pattern):
    assert chosen(target_modules=pattern) is None


def test_names_that_choose_nothing():
    some = Targets.of({"target_modules": ["q_proj", "k_proj", "embed_tokens"]}, "place")
    assert some.absent(MODULES) == ["k_proj"]
    layers = Targets.of({"target_modules": ["q_proj"], "layers_to_transform": [1, 7]}, "place")
    assert layers.absent_layers(MODULES) == [7]


def test_last_names_only_where_they_choose_no_other_module():
    q = [module for module in MODULES if module.endswith("q_proj")]
    assert targets(q, MODULES) == ["q_proj"]
    assert targets([*q, "lm_head"], MODULES) == ["lm_head", "q_proj"]
    assert targets(q[:-1], MODULES) == sorted(q[:-1])
    assert targets(["model.layers.0.q"], ["model.layers.0.q", "model.layers.0"]) == ["q"]


def of(names, modules, **config):
    return Targets.of({"target_modules": names, **config}, "place"), modules


Q = ["h.0.q", "h.1.q"]
UP = ["h.0.up", "h.1.up"]


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        ([of(["q"], Q)], ["q"]),
        ([of(["q", "absent"], Q)], ["q"]),
        ([of(["q"], Q), of(["up"], UP)], ["q", "up"]),
        ([of(["q"], Q), of(["q", "up"], Q + UP)], ["q", "up"]),
        # One adapter lacks a module that its own names choose: they chose more than was saved.
        ([of(["q"], Q[:1]), of(["q"], Q)], Q),
        # The layers have different modules: there may be further layers.
        ([of(["q", "up"], [*Q, *UP[:1]])], [*Q, *UP[:1]]),
        ([of(["q"], Q[1:])], Q[1:]),
        # Anything but a plain list of names.
        ([of(["q"], Q, layers_to_transform=[0, 1])], Q),
        ([of(["q"], Q, exclude_modules=["x"])], Q),
        ([of(r".*\.q", Q)], Q),
        ([of(None, Q)], Q),
        ([of(["q"], Q), of("all-linear", UP)], sorted(Q + UP)),
        ([of(Q, Q)], Q),
        # Stacks of different heights, such as a vision tower, are complete each.
        ([of(["q"], [*Q, "tower.h.0.q"])], ["q"]),
        ([of(["q"], [*Q, "tower.h.1.q"])], [*Q, "tower.h.1.q"]),
        # Present paths of modules that transformers has renamed.
        (
            [of(r".*q", ["language_model.model.h.0.q"])],
            ["language_model.model.h.0.q", "model.language_model.h.0.q"],
        ),
    ],
)
def test_what_several_adapters_chose_and_no_more(inputs, expected):
    assert common_targets(inputs) == sorted(expected)
