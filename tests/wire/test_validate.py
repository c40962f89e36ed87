import dataclasses
import functools
import math

import pytest
import torch

from flexlora.lowrank.factors import Adapter, Factors
from flexlora.method.interface import Client, ModuleSpec, Upload, UploadSpec
from flexlora.wire import validate
from support import factors as support_factors

random_factors = functools.partial(support_factors.random_factors, dtype=torch.float32)
SHAPES = {"model.q": (11, 7), "model.up": (13, 5)}
CLIENT = Client("anna", {"model.q": 3, "model.up": 2}, "small", 17)
EXPECTED = UploadSpec({m: ModuleSpec(SHAPES[m], 1, rank) for m, rank in CLIENT.ranks.items()})
GOOD = Upload(
    "anna",
    4,
    Adapter(
        {
            "model.q": random_factors(11, 3, 7),
            "model.up": random_factors(13, 2, 5),
        }
    ),
    17,
)


def check(**changes) -> None:
    validate.upload(dataclasses.replace(GOOD, **changes), CLIENT, 4, EXPECTED, 17)


def with_module(module: str, factors: Factors) -> Adapter:
    return Adapter({**GOOD.adapter, module: factors})


def test_what_was_requested_passes():
    check()
    check(adapter=with_module("model.q", random_factors(11, 1, 7)))


def with_value(value: float, half: str) -> Factors:
    factors = random_factors(11, 3, 7)
    getattr(factors, half)[1, 1] = value
    return factors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"client": "bo"}, "names client 'bo', round 4"),
        ({"round": 3}, "names client 'anna', round 3"),
        ({"examples": 0}, "counts 0 examples"),
        ({"examples": -5}, "counts -5 examples"),
        ({"examples": 18}, "counts 18 examples"),
        (
            {"adapter": Adapter({"model.q": GOOD.adapter["model.q"]})},
            r"lacks \['model.up'\]",
        ),
        (
            {"adapter": with_module("lm_head", random_factors())},
            r"unexpected \['lm_head'\]",
        ),
        (
            {"adapter": with_module("model.q", random_factors(7, 3, 11))},
            r"'model.q' is \(7, 11\) \(out, in\), not \(11, 7\)",
        ),
        (
            {"adapter": with_module("model.q", random_factors(11, 4, 7))},
            "'model.q' has rank 4; this client's rank is 3",
        ),
        (
            {"adapter": with_module("model.up", random_factors(13, 0, 5))},
            "'model.up' has rank 0",
        ),
        (
            {"adapter": with_module("model.q", with_value(math.nan, "A"))},
            "contains NaN or infinity",
        ),
        (
            {"adapter": with_module("model.q", with_value(-math.inf, "B"))},
            "contains NaN or infinity",
        ),
        (
            {"adapter": with_module("model.q", with_value(3e38, "B"))},
            "has a factor with the norm 3e\\+38, above",
        ),
        (
            {"adapter": with_module("model.q", with_value(-2e6, "A"))},
            "has a factor with the norm 2e\\+06, above",
        ),
    ],
)
def test_everything_else_is_refused_with_its_place(changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        check(**changes)
    assert str(caught.value).startswith("The upload of client 'anna' for round 4")


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.float8_e5m2])
def test_dtypes_in_which_nothing_is_trained_are_refused(dtype):
    odd = Factors(torch.ones(11, 3).to(dtype), torch.ones(3, 7).to(dtype))
    with pytest.raises(ValueError, match=r"model\.q"):
        check(adapter=with_module("model.q", odd))


NUMBERED = UploadSpec({m: ModuleSpec(SHAPES[m], 1, rank, 5) for m, rank in CLIENT.ranks.items()})
IDS = {"model.q": (0, 4, 2), "model.up": (1, 3)}


def test_numbered_components_pass():
    numbered = dataclasses.replace(GOOD, component_ids=IDS)
    validate.upload(numbered, CLIENT, 4, NUMBERED, 17)


@pytest.mark.parametrize(
    "ids",
    [
        {},
        {"model.q": (0, 4, 2)},
        {**IDS, "lm_head": (1,)},
        {**IDS, "model.up": (1,)},
        {**IDS, "model.up": (1, 1)},
        {**IDS, "model.up": (1, 5)},
        {**IDS, "model.up": (-1, 2)},
        {**IDS, "model.up": (True, 2)},
        {**IDS, "model.up": (1.0, 2)},
    ],
)
def test_components_that_the_server_does_not_know_are_refused(ids):
    with pytest.raises(ValueError, match="numbers"):
        validate.upload(dataclasses.replace(GOOD, component_ids=ids), CLIENT, 4, NUMBERED, 17)


def test_components_that_nobody_asked_for_are_refused():
    with pytest.raises(ValueError, match="numbers the components of 2 modules, not of the 0"):
        check(component_ids=IDS)


BESIDE = UploadSpec(EXPECTED.modules, {"control": EXPECTED.modules})


def test_adapters_beside_an_upload_are_checked_as_it_is():
    control = GOOD.adapter
    beside = dataclasses.replace(GOOD, aux={"control": control})
    validate.upload(beside, CLIENT, 4, BESIDE, 17)
    for aux, message in (
        ({}, r"lacks \['aux control'\] and"),
        ({"control": control, "more": control}, r"unexpected \['aux more'\]"),
        ({"control": control.only(["model.q"])}, r"'aux control' lacks \['model.up'\]"),
        (
            {"control": with_module("model.q", random_factors(7, 3, 11))},
            r"control': .*model\.q",
        ),
        ({"control": with_module("model.q", with_value(math.nan, "A"))}, "'control': .*NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            validate.upload(dataclasses.replace(GOOD, aux=aux), CLIENT, 4, BESIDE, 17)
    with pytest.raises(ValueError, match=r"unexpected \['aux control'\]"):
        validate.upload(beside, CLIENT, 4, EXPECTED, 17)
