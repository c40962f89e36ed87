"""The terms of a federation: what a server may say, and what a node does not take."""

import dataclasses
import json

import pytest
import torch

from flexlora.deployment import run_spec
from flexlora.method.server_optimizer import WithServerOptimizer
from flexlora.methods.flora import FLoRA
from support import models

RUN = "0123456789abcdef"


@pytest.fixture
def said(tmp_path) -> dict:
    """Terms as they travel, as a table."""
    settings = models.settings(tmp_path, method={"name": "flora"})
    made = run_spec.of(settings, RUN, {"attention": 5, "feed_forward": 3})
    return json.loads(made.model_dump_json())


def parsed(said: dict, **changes) -> run_spec.RunSpec:
    return run_spec.parse(json.dumps({**said, **changes}))


def test_terms_survive_their_way(tmp_path, said):
    settings = models.settings(tmp_path, method={"name": "flora"})
    made = run_spec.of(settings, RUN, {"attention": 5, "feed_forward": 3})
    found = parsed(said)
    assert found == made
    assert (found.attention, found.feed_forward, found.seed) == (5, 3, settings.seed)
    assert found.training == settings.training and found.dtype == torch.float32
    assert isinstance(found.composed(), FLoRA)


def test_a_server_optimizer_is_part_of_the_terms(tmp_path):
    settings = models.settings(
        tmp_path, method={"name": "flexlora"}, server_optimizer={"name": "fedadam"}
    )
    made = run_spec.of(settings, RUN, {"attention": 5, "feed_forward": 3})
    assert isinstance(run_spec.parse(made.model_dump_json()).composed(), WithServerOptimizer)


@pytest.mark.parametrize(
    "run",
    [
        *("../../../etc/cron.d", "a/b", "..", "", "0" * 15, "0" * 65, "0" * 16 + "\n", "A" * 16),
        *("0123456789abcdeg", "\u0660" * 16, 7, None, ["0" * 16]),
    ],
)
def test_a_run_s_name_is_no_path(said, run):
    """It names a folder on the node."""
    with pytest.raises(ValueError, match=r"run specification cannot be read \(run: "):
        parsed(said, run=run)


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"extra": 1}, "extra"),
        ({"seed": -1}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"seed": True}, "seed"),
        ({"seed": "1"}, "seed"),
        ({"max_tokens": 7}, "max_tokens"),
        ({"attention": -1}, "attention"),
        ({"attention": -(10**30)}, "attention"),
        ({"feed_forward": 2.0}, "feed_forward"),
        ({"feed_forward": None}, "feed_forward"),
        ({"wire_dtype": "int8"}, "wire_dtype"),
        ({"prompt": "{{ 7 * 7 }}"}, "prompt"),
        ({"method": "flora"}, "method"),
        ({"model": "tiny"}, "model"),
        ({"training": {"epochs": 0}}, "training"),
        ({"training": {"learning_rate": 1e400}}, "training"),
        ({"training": {"unknown": 1}}, "training"),
    ],
)
def test_ill_formed_terms_are_refused_by_name(said, changes, place):
    with pytest.raises(
        ValueError, match=rf"specification cannot be read \(.*{place}.*same version"
    ):
        parsed(said, **changes)


@pytest.mark.parametrize("name", ["run", "model", "method", "training", "attention"])
def test_what_is_missing_is_named(said, name):
    del said[name]
    with pytest.raises(ValueError, match=rf"\({name}: Field required"):
        parsed(said)


@pytest.mark.parametrize("text", ["", "None", "[]", "{", "\ud800", "[" * 10**5, '{"run": ' * 10**4])
def test_what_is_no_table_is_refused(text):
    with pytest.raises(ValueError, match=r"run specification (cannot be|has \d+ c)|surrogates"):
        run_spec.parse(text)


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"attention": 10**30}, "'attention' = 1"),
        ({"feed_forward": 2**14 + 1}, "'feed_forward' = 16385"),
        ({"max_tokens": 10**18}, "'max_tokens' = 1"),
        ({"seed": 10**100}, "'seed' = 1"),
        ({"training": {"epochs": 10**9}}, "'training.epochs' = 1000000000"),
        ({"training": {"max_steps": 10**9}}, "'training.max_steps' = 1000000000"),
        ({"training": {"batch_examples": 10**9}}, "'training.batch_examples' = 1000000000"),
        ({"training": {"pack_tokens": 10**12}}, "'training.pack_tokens' = 1000000000000"),
        ({"training": {"learning_rate": 1e300}}, "'training.learning_rate' = 1e[+]300"),
        ({"training": {"alpha": 1e300}}, "'training.alpha' = 1e[+]300"),
        ({"method": {"name": "ravan", "heads": 10**9}}, "'method.heads' = 1000000000"),
        ({"method": {"name": "fedtt", "cores": 10**9}}, "'method.cores' = 1000000000"),
        ({"method": {"name": ["flora"]}}, "'method.name' = "),
        ({"method": {"name": "flora", "x": {"y": 1}}}, "'method.x' = "),
        ({"method": {"name": "flora", "x": "y" * 201}}, "'method.x' = "),
        ({"regularizer": {"name": "fedprox", "mu": 1e300}}, "'regularizer.mu' = 1e[+]300"),
        ({"model": {"name": "a" * 201}}, "'model.name' = "),
        ({"model": {"name": "a\nforged"}}, r"'model.name' = 'a\\nforged'"),
        ({"model": {"name": "a", "targets": ["x"] * 501}}, "'model.targets' = 501"),
    ],
)
def test_numbers_and_texts_beyond_all_use_are_refused(said, changes, place):
    with pytest.raises(ValueError, match=place) as caught:
        parsed(said, **changes)
    assert len(str(caught.value)) < 500 and str(caught.value).isprintable()


def test_a_specification_has_a_longest_form(said):
    with pytest.raises(ValueError, match=f"at most {run_spec.LONGEST}"):
        run_spec.parse(json.dumps({**said, "x": "y" * run_spec.LONGEST}))


def test_a_kernel_that_is_not_installed_is_not_downloaded(said, monkeypatch):
    """transformers would download one in its place, and run it."""
    monkeypatch.setattr(run_spec, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="'flash_attention_2', whose package flash_attn"):
        parsed(said, model={"name": "a", "attention": "flash_attention_2"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": {"name": "flra"}}, "There is no method 'flra'. Did you mean 'flora'?"),
        ({"method": {}}, "'method.name' is missing"),
        ({"method": {"name": "../evil"}}, "There is no method '../evil'"),
        ({"method": {"name": "os"}}, "There is no method 'os'"),
        ({"method": {"name": "flora", "rank": 3}}, "The method 'flora' has no option 'rank'"),
        ({"method": {"name": "flora", "weights": 3}}, "option 'weights' is 3"),
        ({"server_optimizer": {"name": "fedavg"}}, "no server optimizer 'fedavg'"),
        ({"server_optimizer": {}}, "'server_optimizer.name' is missing"),
        ({"regularizer": {"name": "none"}}, "There is no regularizer 'none'"),
    ],
)
def test_what_this_version_does_not_have_is_refused(said, changes, message):
    with pytest.raises(ValueError) as error:
        parsed(said, **changes)
    assert message in str(error.value)


def test_a_source_has_no_other_fields(said):
    """trust_remote_code, for instance."""
    said["model"]["trust_remote_code"] = True
    with pytest.raises(ValueError, match=r"run specification cannot be read"):
        parsed(said)


@pytest.mark.parametrize("name", ["kernels-community/flash-attn2", "evil/kernel@main:run"])
def test_a_server_names_no_code_to_load(said, name):
    said["model"]["attention"] = name
    with pytest.raises(ValueError, match="attention"):
        parsed(said)


def test_the_fields_of_the_model_are_known():
    """Whoever adds one must ask what a server could do with it."""
    names = [field.name for field in dataclasses.fields(run_spec.Source)]
    assert names == ["name", "dtype", "device", "quantize", "attention", "targets"]
