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
    with pytest.raises(ValueError, match=r"run specification cannot be read|surrogates"):
        run_spec.parse(text)


def test_huge_numbers_are_numbers(said):
    """What they would cost is for the owner's means to say, not for the form."""
    found = parsed(said, attention=10**30, max_tokens=10**18, seed=10**100)
    assert (found.attention, found.max_tokens, found.seed) == (10**30, 10**18, 10**100)


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
