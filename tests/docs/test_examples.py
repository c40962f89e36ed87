"""Every example runs, as its first lines say."""

import json
from pathlib import Path

import pytest
import torch

import flexlora
from flexlora import peft_format
from flexlora.lowrank import Adapter
from support import models
from support.commands import python
from support.factors import random_factors

EXAMPLES = Path(__file__).parents[2] / "examples"
MODULE = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def run(tmp_path):
    """A function that runs an example with these words; what it prints."""

    def run(name, *words):
        result = python(
            EXAMPLES / name, *words, cwd=tmp_path, FLEXLORA_CACHE=str(tmp_path / "cache")
        )
        assert result.code == 0, result.err
        return result

    return run


def test_a_federation(run, tmp_path):
    models.save(tmp_path / "model")
    result = run("federation.py", tmp_path / "model", "run")
    lines = result.out.splitlines()
    assert sum(line.startswith("round 2, ") for line in lines) == 3
    adapter = lines[-1].removeprefix("adapter: ")
    ranks = peft_format.read(tmp_path / adapter).ranks
    assert max(ranks.values()) == 16
    text = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8")
    events = [json.loads(line) for line in text.splitlines()]
    assert next(e["adapter"] for e in events if e["event"] == "evaluation") == "base"


def test_its_config_is_valid_as_it_stands():
    settings = flexlora.load(EXAMPLES / "federation.toml")
    assert settings.model.name == "smollm2-135m-instruct"


def test_merging(run, tmp_path):
    for name, rank in (("a", 20), ("b", 3)):
        factors = random_factors(41, rank, 37, seed=rank, dtype=torch.float32)
        peft_format.write(Adapter({MODULE: factors}), tmp_path / name, base_model="tiny")
    result = run("merge_adapters.py", "a", "b", "merged")
    assert "1 modules; at least" in result.out and "base model  tiny" in result.out
    assert peft_format.read(tmp_path / "merged").ranks == {MODULE: 16}


def test_every_example_has_a_test():
    source = Path(__file__).read_text(encoding="utf-8")
    for path in EXAMPLES.glob("*.py"):
        assert f'"{path.name}"' in source or (Path(__file__).parent / f"test_{path.name}").exists()
