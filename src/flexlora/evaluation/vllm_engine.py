"""Answers by vLLM, if it is installed. Unverified: tested only with a stand-in for vLLM.

vLLM loads the base model a second time, so it needs additional memory. It uses its own kernels:
its answers are close to those of ``decoding``, but not identical.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flexlora import peft_format
from flexlora.data import Int32s
from flexlora.errors import ConfigError
from flexlora.evaluation.generation import stops, text
from flexlora.lowrank import Factors
from flexlora.model import Base, export, smollm2
from flexlora.storage import scratch

NAME = "vllm"
"""The package."""


def check(base: Base, adapters: Sequence[Mapping[str, Factors]]) -> int:
    """The ``max_lora_rank`` that vLLM needs for these adapters, 0 if none has a module.

    Raises:
        ConfigError: vLLM is not installed, a rank is larger than vLLM supports, or the base
            model is quantised, which vLLM's copy would not be.
    """
    require()
    if getattr(base.model, "hf_quantizer", None) is not None:
        raise ConfigError(
            f"evaluation.engine is 'vllm', but {base.name} is quantised to 4 bits and vLLM would "
            "load it unquantised; set evaluation.engine to 'own', or model.quantize to 'none'."
        )
    largest = max((f.rank for adapter in adapters for f in adapter.values()), default=0)
    ranks = [rank for rank in (0, *peft_format.VLLM_RANKS) if rank >= largest]
    if not ranks:
        raise ConfigError(
            f"An adapter has rank {largest}, but vLLM supports at most "
            f"{max(peft_format.VLLM_RANKS)}; set evaluation.engine to 'own'."
        )
    return ranks[0]


def require() -> None:
    """Check that vLLM is installed.

    Raises:
        ConfigError: it is not.
    """
    if importlib.util.find_spec(NAME) is None:
        raise ConfigError(
            "evaluation.engine is 'vllm', which is not installed; install it with: pip install "
            "vllm, or set evaluation.engine to 'own'."
        )


def answers_of_each(
    base: Base,
    adapters: Sequence[Mapping[str, Factors]],
    prompts: Sequence[Int32s],
    max_new_tokens: int,
    end: int | None = None,
) -> list[list[str]]:
    """The answers of each adapter to each prompt, decoded greedily by vLLM.

    An adapter without modules stands for the base model. The others are passed as temporary
    PEFT directories; the engine is created for this call. All prompts of all adapters are one
    call, which vLLM schedules. ``end`` is the prompt format's end token, None for the tokenizer's.

    Raises:
        ConfigError: see ``check``.
    """
    rank = check(base, adapters)
    ends = stops(base, end)
    with scratch("vllm") as folder:
        requests = list(_requests(base, adapters, folder))
        outputs = _generated(base, requests, prompts, max_new_tokens, ends, rank)
    texts = iter(text(base.tokenizer, list(o.outputs[0].token_ids), ends) for o in outputs)
    return [[next(texts) for _ in prompts] for _ in adapters]


def _requests(base: Base, adapters: Sequence[Mapping[str, Factors]], folder: Path) -> Iterator[Any]:
    """The LoRA request of each adapter, or None for the base model."""
    vllm: Any = importlib.import_module(f"{NAME}.lora.request")
    for number, adapter in enumerate(adapters, 1):
        if not adapter:
            yield None
            continue
        name, path = f"adapter{number}", folder / f"adapter{number}"
        export(base, adapter, path)
        yield vllm.LoRARequest(lora_name=name, lora_int_id=number, lora_path=str(path))


def _generated(
    base: Base,
    requests: Sequence[Any],
    prompts: Sequence[Int32s],
    max_new_tokens: int,
    ends: Sequence[int],
    rank: int,
) -> Sequence[Any]:
    """The outputs of vLLM for every prompt of every adapter, adapter by adapter."""
    vllm: Any = importlib.import_module(NAME)
    longest = max(map(len, prompts), default=0)
    loras = sum(request is not None for request in requests)
    lora_options = {"enable_lora": True, "max_lora_rank": rank, "max_loras": loras}
    engine = vllm.LLM(
        model=smollm2.folder() if base.name == smollm2.NAME else base.name,
        dtype=str(base.model.dtype).removeprefix("torch."),
        max_model_len=longest + max_new_tokens,
        # The prompts of a client share their instruction, which vLLM then computes once.
        enable_prefix_caching=True,
        **(lora_options if loras else {}),
    )
    greedy = vllm.SamplingParams(
        temperature=0.0, max_tokens=max_new_tokens, stop_token_ids=list(ends), detokenize=False
    )
    inputs = [{"prompt_token_ids": ids.tolist()} for _ in requests for ids in prompts]
    per_input = [request for request in requests for _ in prompts] if loras else None
    outputs: Sequence[Any] = engine.generate(inputs, greedy, lora_request=per_input, use_tqdm=False)
    return outputs
