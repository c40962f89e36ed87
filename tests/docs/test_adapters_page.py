"""docs/adapters.md: its commands run one after another, and its table of what is read is true."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from flexlora.errors import AdapterError
from flexlora.peft_format import check, merge, write
from flexlora.peft_format.reading import open_adapter
from support import commands
from support.factors import random_factors
from support.peft_folders import Q0, Q1, key, matrix, store, tensors_of

PAGE = (Path(__file__).parents[2] / "docs" / "adapters.md").read_text(encoding="utf-8")
TABLE = PAGE.partition("## What is read")[2].partition("## Load")[0]
EMBED, HEAD = "model.embed_tokens", "lm_head"


def embedding():
    start = f"base_model.model.{EMBED}.lora_embedding_"
    return {f"{start}A": matrix(2, 13, 1), f"{start}B": matrix(7, 2, 2)}


def head():
    copy = {f"base_model.model.{HEAD}.base_layer.weight": matrix(11, 7, 5)}
    return tensors_of({HEAD: 2}) | copy


def renamed(change):
    return {change(name): value for name, value in tensors_of({Q0: 2, Q1: 2}).items()}


def with_tensor(name, *shape):
    return tensors_of({Q0: 2, Q1: 2}) | {f"base_model.model.{name}": torch.zeros(shape)}


CONV = {key(Q0, "A"): torch.zeros(2, 7, 1, 1), key(Q0, "B"): torch.zeros(11, 2, 1, 1)}
EMPTY = {name: torch.zeros(0) for name in tensors_of({Q0: 2})}

MERGED = {
    "LoRA of linear": [
        {"use_rslora": True, "alpha_pattern": {"layers.0.*": 3}},
        {"tensors": tensors_of({Q0: 2, Q1: 5}), "rank_pattern": {"layers.1.*": 5}},
    ],
    "`layers_to_transform`": [
        {"layers_to_transform": [0, 1]},
        {"exclude_modules": ["lm_head"]},
        {"target_modules": ".*q_proj"},
        {"target_modules": "all-linear"},
    ],
    "Conv1D": [{"fan_in_fan_out": True}],
    "LoRA of `lm_head`": [
        {"tensors": head(), "target_modules": [HEAD]},
        {"tensors": tensors_of({HEAD: 2}), "target_modules": [HEAD]},
    ],
    "LoRA of `embed": [{"tensors": embedding(), "target_modules": ["embed_tokens"]}],
    "encoder-decoder": [{"task_type": "SEQ_2_SEQ_LM"}, {"task_type": "FEATURE_EXTRACTION"}],
    "names with": [
        {"tensors": renamed(lambda name: name.replace(".weight", ".default.weight"))},
        {"tensors": renamed(lambda name: f"_orig_mod.{name}")},
        {"tensors": renamed(lambda name: f"module.{name}")},
        {"tensors": renamed(lambda name: name.replace("layers", "_fsdp_wrapped_module.layers"))},
        {"tensors": renamed(lambda name: name.removeprefix("base_model.model."))},
    ],
    "settings unknown": [
        {"trained_with": "x"},
        {"r": "2", "lora_alpha": "6"},
        {"tensors": tensors_of({Q0: 8}), "r": "absent", "lora_alpha": "absent"},
    ],
    "a rank of 0": [{"rank_pattern": {"v_proj": 0}}],
    "`modules_to_save`, if": [
        {"modules_to_save": ["score"], "tensors": with_tensor("score.weight", 5, 7)}
    ],
}
REFUSED = {
    "settings of a newer": [{"peft_version": "9.0.0", "use_novelty": True}],
    "`modules_to_save` of only": [{"tensors": with_tensor("lm_head.weight", 5, 7)}],
    "DoRA": [{"use_dora": True}, {"lora_bias": True}, {"bias": "all"}],
    "PiSSA": [{"init_lora_weights": name} for name in ("pissa", "olora", "corda", "loftq")],
    "aLoRA": [{"alora_invocation_tokens": [1]}, {"trainable_token_indices": [1]}],
    "`target_parameters`": [{"target_parameters": ["x"]}, {"tensors": CONV}],
    "ZeRO-3": [{"tensors": EMPTY}],
}
ELSEWHERE = {"shards", "tied", "pickles", "MLX"}
"""Rows that other tests hold: test_merging_with_peft.py and test_layouts.py."""


def rows():
    cells = [line.strip("|").split("|") for line in TABLE.splitlines() if line.startswith("| ")][2:]
    return {name.strip(): outcome.strip() for name, outcome, _ in cells}


def test_every_row_is_tried():
    for outcome, tried in (("merged", MERGED), ("refused", REFUSED)):
        listed = [name for name, value in rows().items() if value == outcome]
        starts = [*tried, *ELSEWHERE]
        assert all(any(name.startswith(start) for start in starts) for name in listed)
        assert all(any(name.startswith(start) for name in listed) for start in tried)
    assert set(rows().values()) == {"merged", "refused"}


@pytest.mark.parametrize("config", [c for cs in MERGED.values() for c in cs])
def test_what_is_merged(tmp_path, config):
    folder = store(tmp_path / "in", **config)
    merge([folder, folder], tmp_path / "out")
    before, after = open_adapter(folder).adapter, open_adapter(tmp_path / "out").adapter
    assert set(before) == set(after)
    for module, update in before.items():
        torch.testing.assert_close(after[module].B @ after[module].A, update.B @ update.A)
    assert check(tmp_path / "out").verdicts[0].outcome == "reads"


@pytest.mark.parametrize("config", [c for cs in REFUSED.values() for c in cs])
def test_what_is_refused(tmp_path, config):
    with pytest.raises(AdapterError):
        merge([store(tmp_path / "in", **config)], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_commands_of_the_page_run_one_after_another(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for rank, name in enumerate(("hospital", "phone", "lab"), 2):
        write({Q0: random_factors(11, rank, 7, seed=rank, dtype=torch.float32)}, name, "tiny/base")
    lines = [
        line
        for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
        for line in block.splitlines()
        if re.match(r"flexlora (merge|check)", line) and "--base" not in line
    ]
    assert len(lines) == 5
    for line in lines:
        result = commands.call(monkeypatch, capsys, *shlex.split(line)[1:])
        assert result.code == 0, result.err
