import math
import warnings

import pytest
import torch
from torch import nn

from flexlora.training.optimizer import Training


def rates(settings: Training, steps: int, round: int = 1) -> list[float]:
    return [settings.rate(step, steps, round) for step in range(steps)]


def test_linear_is_that_of_transformers():
    from transformers import get_linear_schedule_with_warmup

    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.3)
    schedule = get_linear_schedule_with_warmup(optimizer, 0, 5)
    want = []
    for _ in range(5):
        want.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates(Training(learning_rate=0.3), 5) == pytest.approx(want)


def test_cosine_falls_from_the_peak_along_half_a_wave():
    got = rates(Training(learning_rate=0.3, schedule="cosine"), 4)
    assert got == pytest.approx([0.3 * (1 + math.cos(math.pi * i / 4)) / 2 for i in range(4)])


def test_constant_is_constant_and_rounds_decay():
    settings = Training(learning_rate=0.3, schedule="constant", round_decay=0.5)
    assert rates(settings, 3) == [0.3] * 3
    assert rates(settings, 3, round=3) == pytest.approx([0.075] * 3)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_warm_up_reaches_the_peak_and_never_begins_at_zero(schedule):
    got = rates(Training(learning_rate=0.3, schedule=schedule, warmup_steps=3), 7)
    assert got[:4] == pytest.approx([0.1, 0.2, 0.3, 0.3])
    assert all(rate > 0 for rate in got)


def test_a_turn_shorter_than_its_warm_up():
    got = rates(Training(learning_rate=0.3, warmup_steps=6), 2)
    assert got == pytest.approx([0.05, 0.1])


@pytest.mark.parametrize("rank", [2, 5])
@pytest.mark.parametrize(("scaling", "rslora"), [("rank", False), ("sqrt", True)])
def test_the_scale_is_that_of_peft(rank, scaling, rslora):
    import peft

    config = peft.LoraConfig(r=rank, lora_alpha=12, target_modules=["0"], use_rslora=rslora)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(nn.Sequential(nn.Linear(7, 11)), config)
    want = model.base_model.model[0].scaling["default"]
    assert Training(alpha=12, scaling=scaling).scale(rank) == pytest.approx(want)


def test_without_scaling_the_scale_is_alpha():
    assert {Training(alpha=3, scaling="none").scale(rank) for rank in (1, 5)} == {3.0}


def test_optimisers_are_made_fresh_with_the_settings():
    parameter = nn.Parameter(torch.ones(3))
    adamw = Training(learning_rate=0.2, weight_decay=0.3).make([parameter])
    assert isinstance(adamw, torch.optim.AdamW)
    assert (adamw.defaults["lr"], adamw.defaults["weight_decay"]) == (0.2, 0.3)
    sgd = Training(optimizer="sgd", momentum=0.7, weight_decay=0.3).make([parameter])
    assert isinstance(sgd, torch.optim.SGD)
    assert (sgd.defaults["momentum"], sgd.defaults["weight_decay"]) == (0.7, 0.3)
    assert not adamw.state and not sgd.state


@pytest.mark.parametrize(
    "fault",
    [
        {"learning_rate": -0.1},
        {"learning_rate": math.nan},
        {"learning_rate": math.inf},
        {"alpha": 0.0},
        {"alpha": math.nan},
        {"epochs": 0},
        {"max_steps": 0},
        {"batch_examples": 0},
        {"pack_tokens": 0},
        {"clip_norm": 0.0},
        {"clip_norm": -1.0},
        {"warmup_steps": -1},
        {"weight_decay": -0.1},
        {"momentum": -0.1},
        {"round_decay": -1.0},
        {"recompute_above": -1},
    ],
)
def test_numbers_with_which_nothing_would_be_learnt_are_refused(fault):
    """At once: not in the middle of a round, and never by training nothing in silence."""
    (name,) = fault
    with pytest.raises(ValueError, match=name):
        Training(**fault)
