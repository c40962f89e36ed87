"""The programs that load PEFT adapters, and which of them would misread a given one.

The rules follow the sources of PEFT 0.21.2, vLLM 0.30.0 and later, llama.cpp's
``convert_lora_to_gguf.py``, SGLang's ``lora.py`` and TensorRT-LLM's ``lora_manager.py``; none of
these is run.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexlora.peft_format.config import Settings
from flexlora.peft_format.reading import Layer, PeftAdapter
from flexlora.peft_format.report import Verdict
from flexlora.peft_format.writing import VLLM_RANKS

_VLLM_DEFAULT_RANK = 16
_SCALE_TOLERANCE = 1e-6
_MERGED = "merge it into its base model with PEFT and serve the merged model"


@dataclass(frozen=True)
class Description:
    """An adapter without its values.

    ``loading`` is what PEFT makes of it, before any other program.
    """

    adapter: PeftAdapter
    loading: Verdict

    @property
    def layers(self) -> Mapping[str, Layer]:
        """The layers by module."""
        return self.adapter.layers

    @property
    def settings(self) -> Settings:
        """The settings that decide how the factors are applied."""
        return self.adapter.settings

    @property
    def rank(self) -> int:
        """The largest rank of a module."""
        return max(layer.rank for layer in self.layers.values())

    @property
    def heads(self) -> list[str]:
        """The adapted modules that lie in no layer, such as ``lm_head`` and ``embed_tokens``."""
        return [module for module in self.layers if not re.search(r"\.\d+\.", module)]

    def rewrite(self, rank: str = "max") -> str:
        """The command that writes a standard PEFT adapter of one rank and scale 1."""
        return rewrite(self.adapter.directory, rank)

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


def verdicts(adapter: PeftAdapter, loading: Verdict) -> tuple[Verdict, ...]:
    """What each program makes of a plain ``B @ A`` adapter; ``loading`` is PEFT's verdict."""
    description = Description(adapter, loading)
    others = _unreadable(adapter) or _whole(adapter.parts.whole)
    return (
        loading,
        *(
            others
            or (
                _vllm_old(description),
                _vllm_new(description),
                _sglang(description),
                _llama_cpp(description),
                _tensorrt_llm(description),
            )
        ),
    )


def rewrite(directory: Path, rank: str = "max") -> str:
    """The command that writes an adapter in the form that every program reads alike."""
    return f"flexlora merge {shlex.quote(str(directory))} --rank {rank} --out NEW"


def _unreadable(adapter: PeftAdapter) -> tuple[Verdict, ...]:
    """What the others say to files that PEFT's ``save_pretrained`` never writes."""
    if adapter.weights.sharded:
        why = "it looks for one adapter_model.safetensors, and this adapter is in shards"
        programs = ["vLLM", "llama.cpp", "TensorRT-LLM"]
    elif adapter.weights.names.adapter:
        why = "it does not know tensors whose names contain the adapter's name"
        programs = ["vLLM", "llama.cpp"]
    else:
        return ()
    remedy = rewrite(adapter.directory)
    return tuple(Verdict(program, "refuses", why, remedy) for program in programs)


def _whole(paths: Collection[str]) -> tuple[Verdict, ...]:
    """What the others say to tensors of modules that were trained as a whole."""
    if not paths:
        return ()
    vllm = "it does not support modules_to_save (later versions take classifier and score)"
    llama_cpp = "besides the factors it takes no whole tensors except norms"
    return (
        Verdict("vLLM", "refuses", vllm, _MERGED),
        Verdict("llama.cpp", "refuses", llama_cpp, _MERGED),
    )


def variant_verdicts(config: Mapping[str, Any]) -> tuple[Verdict, ...]:
    """What the programs make of the commoner variants; empty for other variants."""
    init = str(config.get("init_lora_weights", True)).lower()
    if config.get("use_dora"):
        vllm = llama_cpp = "it does not support DoRA"
    elif (config.get("bias") or "none") != "none" or config.get("lora_bias"):
        vllm = llama_cpp = "it does not support trained biases"
    elif config.get("trainable_token_indices"):
        vllm = llama_cpp = "it does not know the tensors of trainable_token_indices"
    elif init.startswith(("pissa", "olora", "corda", "loftq", "lora_ga")):
        return _changed_base(init)
    elif any(config.get(name) for name in ("alora_invocation_tokens", "target_parameters")):
        return (Verdict("PEFT", "reads"),)
    else:
        return ()
    return (
        Verdict("PEFT", "reads"),
        Verdict("vLLM", "refuses", vllm, _MERGED),
        Verdict("llama.cpp", "refuses", llama_cpp, _MERGED),
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
        conditions = [f"it is started with --max-lora-rank {needed}"]
    else:
        conditions = []
    if adapter.heads:
        conditions.append(f"its model class supports LoRA on {' and '.join(adapter.heads)}")
    return Verdict(consumer, "reads", _if(conditions))


def _if(conditions: Sequence[str]) -> str:
    return f"if {' and '.join(conditions)}" if conditions else ""


def _vllm_old(adapter: Description) -> Verdict:
    """One scale, from the global r and lora_alpha, for all modules (vllm#59799)."""
    consumer = "vLLM up to 0.30.0"
    verdict = _vllm_rank(adapter, consumer)
    rank, alpha = adapter.settings.r, adapter.settings.lora_alpha
    scale = alpha / (math.sqrt(rank) if adapter.settings.use_rslora else rank)
    wrong = adapter.misscaled(lambda _: scale)
    if wrong and verdict.outcome == "reads":
        why = f"it ignores rank_pattern and alpha_pattern; {wrong}"
        return Verdict(consumer, "misreads", why, adapter.rewrite())
    return verdict


def _vllm_new(adapter: Description) -> Verdict:
    return _vllm_rank(adapter, "vLLM after 0.30.0")


def _sglang(adapter: Description) -> Verdict:
    """One scale, lora_alpha / r, for all modules."""
    consumer = "SGLang"
    scale = adapter.settings.lora_alpha / adapter.settings.r
    wrong = adapter.misscaled(lambda _: scale)
    if wrong:
        why = f"it ignores rank_pattern, alpha_pattern and use_rslora; {wrong}"
        return Verdict(consumer, "misreads", why, adapter.rewrite())
    return Verdict(consumer, "reads")


def _llama_cpp(adapter: Description) -> Verdict:
    """One alpha, each tensor's own rank, and no rsLoRA; an alpha of 0 counts as no scale."""
    consumer = "llama.cpp"
    alpha = adapter.settings.lora_alpha
    wrong = adapter.misscaled(lambda layer: alpha / layer.rank if alpha else 1.0)
    if wrong:
        why = f"it supports neither alpha_pattern nor use_rslora; {wrong}"
        return Verdict(consumer, "misreads", why, adapter.rewrite())
    if not adapter.settings.base_model_name_or_path:
        return Verdict(consumer, "reads", "if convert_lora_to_gguf.py is given --base")
    return Verdict(consumer, "reads")


def _tensorrt_llm(adapter: Description) -> Verdict:
    """One alpha, each tensor's own rank, and rsLoRA; nothing outside of the layers.

    It looks up ``target_modules`` by last names.
    """
    consumer = "TensorRT-LLM"
    alpha, rslora = adapter.settings.lora_alpha, adapter.settings.use_rslora
    wrong = adapter.misscaled(
        lambda layer: alpha / (math.sqrt(layer.rank) if rslora else layer.rank)
    )
    if wrong:
        why = f"it ignores alpha_pattern; {wrong}"
        return Verdict(consumer, "misreads", why, adapter.rewrite())
    if adapter.heads:
        why = f"it leaves out modules outside of the layers: {', '.join(adapter.heads)}"
        return Verdict(consumer, "misreads", why, _MERGED)
    conditions = [f"max_lora_rank is at least {adapter.rank}"]
    names = adapter.adapter.targets.modules
    if isinstance(names, str) or any("." in name for name in names or ()):
        conditions.append("it is given lora_target_modules")
    return Verdict(consumer, "reads", _if(conditions))


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
        Verdict("SGLang", "misreads", original, remedy),
        Verdict("llama.cpp", "misreads", original, remedy),
        Verdict("TensorRT-LLM", "misreads", original, remedy),
    )
