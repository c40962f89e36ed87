"""Against a stand-in for vLLM that records what it is told; vLLM itself is not run."""

import importlib.machinery
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from flexlora import peft_format
from flexlora.evaluation.vllm_engine import answers_of_each

NEW = 5


@dataclass(frozen=True)
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str


class Engine:
    """Writes what it was asked, so that an answer shows prompt and adapter."""

    calls: list[dict]

    def __init__(self, **options):
        type(self).calls.append(options)

    def generate(self, prompts, sampling_params, *, use_tqdm=True, lora_request=None):
        loaded = lora_request or [None] * len(prompts)
        assert len(loaded) == len(prompts)
        adapters = {
            request: dict(peft_format.read(Path(request.lora_path)).adapter.items())
            for request in loaded
            if request
        }
        type(self).calls.append(
            {
                "prompts": prompts,
                "sampling": sampling_params,
                "loaded": loaded,
                "adapters": adapters,
            }
        )
        return [
            SimpleNamespace(
                outputs=[
                    SimpleNamespace(
                        token_ids=(
                            prompt["prompt_token_ids"][0],
                            3 + (request.lora_int_id if request else 0),
                            2,
                        )
                    )
                ]
            )
            for prompt, request in zip(prompts, loaded, strict=True)
        ]


@pytest.fixture
def engine(monkeypatch):
    """A module of vLLM's name."""
    stand_in = type("LLM", (Engine,), {"calls": []})
    module, lora, request = (ModuleType(n) for n in ("vllm", "vllm.lora", "vllm.lora.request"))
    module.LLM, module.SamplingParams, request.LoRARequest = stand_in, dict, LoRARequest
    module.__spec__ = importlib.machinery.ModuleSpec("vllm", None)
    for part in (module, lora, request):
        monkeypatch.setitem(sys.modules, part.__name__, part)
    return stand_in


def test_adapters_and_prompts_reach_the_engine(base, adapter, engine, prompts_of_words):
    small = {module: f.first(2) for module, f in adapter.items()}
    answers = answers_of_each(base, [adapter, small], prompts_of_words, NEW)
    created, asked = engine.calls
    assert created["model"] == base.name
    assert created["dtype"] == "float32"
    assert (created["max_lora_rank"], created["max_loras"]) == (8, 2)
    assert created["max_model_len"] == 13 + NEW
    assert asked["sampling"]["temperature"] == 0.0
    assert asked["sampling"]["max_tokens"] == NEW
    assert asked["sampling"]["stop_token_ids"] == [2, 3]
    ids = [prompt["prompt_token_ids"] for prompt in asked["prompts"]]
    assert ids == [p.tolist() for p in prompts_of_words] * 2
    assert [r.lora_int_id for r in asked["loaded"]] == [1] * 4 + [2] * 4
    for given, read in zip((adapter, small), asked["adapters"].values(), strict=True):
        for module, factors in given.items():
            torch.testing.assert_close(read[module].B @ read[module].A, factors.B @ factors.A)
    words = base.tokenizer.convert_ids_to_tokens
    assert answers == [
        [f"{words(int(p[0]))} {words(3 + number)}" for p in prompts_of_words] for number in (1, 2)
    ]


def test_the_folders_are_gone_afterwards(base, adapter, engine, prompts_of_words):
    answers_of_each(base, [adapter], prompts_of_words, NEW)
    assert not Path(engine.calls[1]["loaded"][0].lora_path).exists()


def test_the_base_model_needs_no_lora(base, engine, prompts_of_words):
    answers_of_each(base, [{}], prompts_of_words, NEW)
    assert "enable_lora" not in engine.calls[0]
    assert engine.calls[1]["loaded"] == [None] * 4


def test_without_vllm_it_says_what_to_do(base, adapter, prompts_of_words):
    with pytest.raises(ValueError, match=r"not installed; install it with: pip install vllm, or"):
        answers_of_each(base, [adapter], prompts_of_words, NEW)


def test_a_rank_beyond_vllms_is_refused(base, adapter, engine, prompts_of_words):
    wide = {module: f.padded(513) for module, f in adapter.items()}
    with pytest.raises(ValueError, match=r"rank 513, but vLLM supports at most 512; set"):
        answers_of_each(base, [adapter, wide], prompts_of_words, NEW)
    assert engine.calls == []


def test_a_quantised_model_is_refused(base, adapter, engine, prompts_of_words, monkeypatch):
    monkeypatch.setattr(base.model, "hf_quantizer", object(), raising=False)
    with pytest.raises(ValueError, match="quantised to 4 bits"):
        answers_of_each(base, [adapter], prompts_of_words, NEW)
