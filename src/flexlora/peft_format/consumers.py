"""The programs that load PEFT adapters, and which of them would misread a given one.

The rules follow the sources of PEFT 0.21.2, vLLM 0.30.0 and later, llama.cpp's
``convert_lora_to_gguf.py`` and TensorRT-LLM's ``lora_manager.py``; none of these is run.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexlora.peft_format.patterns import matched
from flexlora.peft_format.reading import Layer
from flexlora.peft_format.report import Verdict
from flexlora.peft_format.writing import VLLM_RANKS

_VLLM_DEFAULT_RANK = 16
_SCALE_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Description:
    """An adapter without its values: its folder, raw configuration and layers."""

    directory: Path
    config: Mapping[str, Any]
    layers: Mapping[str, Layer]

    @property
    def rank(self) -> int:
        """The largest rank of a module."""
        return max(layer.rank for layer in self.layers.values())

    def rewrite(self, rank: str = "max") -> str:
        """The command that writes the adapter in the form that every program reads alike."""
        return f"flexlora merge {shlex.quote(str(self.directory))} --rank {rank} --out NEW"

    def ambiguous(self) -> list[str]:
        """The modules to which ``alpha_pattern`` gives more than one value."""
        patterns = self.config.get("alpha_pattern") or {}
        values = matched(patterns, list(self.layers), "alpha_pattern")
        return [module for module, alphas in values.items() if len(set(alphas)) > 1]

    def misscaled(self, scale: Callable[[Layer], float]) -> str:
        """The modules that get a wrong scale by this rule, with the worst case; else empty."""
        wrong = [
            (module, layer, scale(layer))
            for module, layer in self.layers.items()
            if not math.isclose(scale(layer), layer.scale, rel_tol=_SCALE_TOLERANCE)
        ]
        if not wrong:
            return ""
        module, layer, taken = max(wrong, key=lambda item: abs(item[2] - item[1].scale))
        return (
            f"{len(wrong)} of {len(self.layers)} modules get a wrong scale, such as {module}: "
            f"{taken:.4g} instead of {layer.scale:.4g}"
        )


def verdicts(adapter: Description) -> tuple[Verdict, ...]:
    """What each program makes of a plain ``B @ A`` adapter."""
    return (
        Verdict("PEFT", "reads"),
        _vllm_old(adapter),
        _vllm_new(adapter),
        _llama_cpp(adapter),
        _tensorrt_llm(adapter),
    )


def variant_verdicts(config: Mapping[str, Any]) -> tuple[Verdict, ...]:
    """What the programs make of the commoner variants; empty for other variants."""
    plain = "merge it into its base model with PEFT and serve the merged model"
    init = str(config.get("init_lora_weights", True)).lower()
    if config.get("use_dora"):
        vllm = llama_cpp = "it does not support DoRA"
    elif config.get("modules_to_save"):
        vllm = "it does not support modules_to_save (later versions take classifier and score)"
        llama_cpp = "besides the factors it takes no whole tensors except norms"
    elif config.get("bias", "none") != "none" or config.get("lora_bias"):
        vllm = llama_cpp = "it does not support trained biases"
    elif init.startswith(("pissa", "olora", "corda", "loftq", "lora_ga")):
        return _changed_base(init)
    else:
        return ()
    return (
        Verdict("PEFT", "reads"),
        Verdict("vLLM", "refuses", vllm, plain),
        Verdict("llama.cpp", "refuses", llama_cpp, plain),
    )


def _vllm_rank(adapter: Description, consumer: str) -> Verdict:
    if adapter.rank > VLLM_RANKS[-1]:
        return Verdict(
            consumer,
            "refuses",
            f"rank {adapter.rank} is above its largest, {VLLM_RANKS[-1]}",
            adapter.rewrite(str(VLLM_RANKS[-1])),
        )
    if adapter.rank > _VLLM_DEFAULT_RANK:
        needed = next(rank for rank in VLLM_RANKS if rank >= adapter.rank)
        return Verdict(consumer, "reads", f"if started with --max-lora-rank {needed}")
    return Verdict(consumer, "reads")


def _vllm_old(adapter: Description) -> Verdict:
    """One scale, from the global r and lora_alpha, for all modules (vllm#59799)."""
    consumer = "vLLM up to 0.30.0"
    verdict = _vllm_rank(adapter, consumer)
    rank, alpha = adapter.config["r"], adapter.config["lora_alpha"]
    scale = alpha / (math.sqrt(rank) if adapter.config.get("use_rslora") else rank)
    wrong = adapter.misscaled(lambda layer: scale)
    if wrong and verdict.outcome == "reads":
        why = f"it ignores rank_pattern and alpha_pattern; {wrong}"
        return Verdict(consumer, "misreads", why, adapter.rewrite())
    return verdict


def _vllm_new(adapter: Description) -> Verdict:
    return _vllm_rank(adapter, "vLLM after 0.30.0")


def _llama_cpp(adapter: Description) -> Verdict:
    """One alpha, each tensor's own rank, and no rsLoRA; an alpha of 0 counts as no scale."""
    consumer = "llama.cpp"
    alpha = adapter.config["lora_alpha"]
    wrong = adapter.misscaled(lambda layer: alpha / layer.rank if alpha else 1.0)
    if wrong:
        why = f"it supports neither alpha_pattern nor use_rslora; {wrong}"
        return Verdict(consumer, "misreads", why, adapter.rewrite())
    if not adapter.config.get("base_model_name_or_path"):
        return Verdict(consumer, "reads", "if convert_lora_to_gguf.py is given --base")
    return Verdict(consumer, "reads")


def _tensorrt_llm(adapter: Description) -> Verdict:
    """One alpha, each tensor's own rank, and rsLoRA."""
    consumer = "TensorRT-LLM"
    alpha, rslora = adapter.config["lora_alpha"], adapter.config.get("use_rslora")
    wrong = adapter.misscaled(
        lambda layer: alpha / (math.sqrt(layer.rank) if rslora else layer.rank)
    )
    if wrong:
        why = f"it ignores alpha_pattern; {wrong}"
        return Verdict(consumer, "misreads", why, adapter.rewrite())
    return Verdict(consumer, "reads", f"if max_lora_rank is at least {adapter.rank}")


def _changed_base(init: str) -> tuple[Verdict, ...]:
    """Initialisations that subtract from the base weights."""
    original = "it adds the factors to the original base model, which training had changed"
    remedy = (
        "train again with another init_lora_weights"
        if init.startswith("loftq")
        else "save_pretrained(..., path_initial_model_for_weight_conversion=...) with PEFT"
    )
    newer = Verdict("vLLM after 0.30.0", "refuses", f"it does not support {init}", remedy)
    if init.startswith("lora_ga"):
        newer = Verdict("vLLM after 0.30.0", "misreads", original, remedy)
    return (
        Verdict("vLLM up to 0.30.0", "misreads", original, remedy),
        newer,
        Verdict("llama.cpp", "misreads", original, remedy),
        Verdict("TensorRT-LLM", "misreads", original, remedy),
    )
