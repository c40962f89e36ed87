"""What is in a PEFT adapter directory, and which programs would misread it."""

from __future__ import annotations

import math
import shlex
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from flexlora.lowrank import Factors
from flexlora.peft_format.config import Unsupported, read_config
from flexlora.peft_format.patterns import matched
from flexlora.peft_format.reading import WEIGHTS, Layer, PeftAdapter, read
from flexlora.peft_format.writing import VLLM_RANKS

Outcome = Literal["reads", "misreads", "refuses"]

LARGE_RMS = 0.1
"""Entries of language models' weight matrices have a root mean square of some 0.01 to 0.05;
an update beyond this value drowns them."""

_VLLM_DEFAULT_RANK = 16
_SCALE_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Verdict:
    """What one program makes of the adapter: ``why`` and ``remedy`` may be empty."""

    consumer: str
    outcome: Outcome
    why: str = ""
    remedy: str = ""

    def line(self) -> str:
        """The verdict in one line."""
        said = {
            "reads": "reads it as PEFT does",
            "misreads": "misreads it",
            "refuses": "refuses it",
        }[self.outcome]
        why = f": {self.why}" if self.why else ""
        return f"{self.consumer}: {said}{why}" + (f" -> {self.remedy}" if self.remedy else "")


@dataclass(frozen=True)
class Report:
    """What ``check`` found.

    ``ranks`` maps a rank to how many modules have it; ``scales`` are the distinct factors
    (alpha / rank, or alpha / sqrt(rank) for rsLoRA) before ``B @ A``; ``largest`` is the
    module whose update has the largest Frobenius norm. When ``refusal`` is not empty, the
    adapter is more than ``B @ A`` and the values were not looked at: ``modules`` is 0.
    """

    directory: Path
    base_model: str | None
    task_type: str | None
    bytes: int
    refusal: str = ""
    modules: int = 0
    parameters: int = 0
    ranks: Mapping[int, int] | None = None
    scales: tuple[float, ...] = ()
    dtypes: tuple[str, ...] = ()
    largest: tuple[str, float] | None = None
    verdicts: tuple[Verdict, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def alike(self) -> bool:
        """Whether every program reads the adapter as PEFT does."""
        return not self.refusal and all(v.outcome == "reads" for v in self.verdicts)

    def lines(self) -> list[str]:
        """The report as text, one fact a line."""
        lines = [
            f"adapter     {self.directory}",
            f"base model  {_clean(self.base_model) if self.base_model else 'not named'}",
            f"task        {_clean(self.task_type) if self.task_type else 'not named'}",
        ]
        if self.refusal:
            lines += [f"bytes       {self.bytes:,}", f"refused     {self.refusal}"]
        else:
            ranks = ", ".join(f"{r} (x{n})" for r, n in sorted((self.ranks or {}).items()))
            lines += [
                f"modules     {self.modules:,}",
                f"ranks       {ranks}",
                f"parameters  {self.parameters:,} in {self.bytes:,} bytes, "
                f"{', '.join(self.dtypes)}",
                f"scales      {', '.join(f'{scale:g}' for scale in self.scales)}",
            ]
        if self.largest:
            lines.append(f"largest     {self.largest[0]}, norm {self.largest[1]:.4g}")
        lines += [verdict.line() for verdict in self.verdicts]
        return lines + [f"warning: {warning}" for warning in self.warnings]


def check(directory: str | Path) -> Report:
    """Read an adapter through, one module in memory at a time, and judge who reads it alike.

    The verdicts follow the sources of PEFT 0.21.2, vLLM 0.30.0 and later, llama.cpp's
    ``convert_lora_to_gguf.py`` and TensorRT-LLM's ``lora_manager.py``; none of these is run.

    Raises:
        AdapterError: the directory holds no sound LoRA adapter: something is missing,
            malformed, inconsistent, NaN or infinite. An adapter that is sound, but more
            than ``B @ A``, is reported with its ``refusal``.
    """
    directory = Path(directory)
    config = read_config(directory)
    try:
        stored = read(directory)
    except Unsupported as error:
        return _unsupported(directory, config, str(error))
    facts = _Facts(directory, config, stored.layers)
    values = [_inspect(module, factors) for module, factors in stored.adapter.items()]
    largest = max(values, key=lambda value: value.norm)
    return Report(
        directory=directory,
        base_model=stored.base_model,
        task_type=stored.task_type,
        bytes=(directory / WEIGHTS).stat().st_size,
        modules=len(stored.layers),
        parameters=sum(layer.parameters for layer in stored.layers.values()),
        ranks=Counter(stored.ranks.values()),
        scales=tuple(sorted({layer.scale for layer in stored.layers.values()})),
        dtypes=_dtypes(stored),
        largest=(largest.module, largest.norm),
        verdicts=(
            Verdict("PEFT", "reads"),
            _vllm_old(facts),
            _vllm_new(facts),
            _llama_cpp(facts),
            _tensorrt_llm(facts),
        ),
        warnings=tuple(_warnings(values, facts)),
    )


def _dtypes(stored: PeftAdapter) -> tuple[str, ...]:
    found = {half.dtype for layer in stored.layers.values() for half in (layer.A, layer.B)}
    return tuple(sorted(str(dtype).removeprefix("torch.") for dtype in found))


# --- the values ----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Values:
    """One module: its update's norm and shape, and which of its terms do nothing."""

    module: str
    norm: float
    rms: float
    zero: bool
    rank: int
    dead: int


def _inspect(module: str, factors: Factors) -> _Values:
    B, A = factors.B.double(), factors.A.double()
    # ||B A||^2 = sum((B'B) * (A A')): never larger than rank x rank.
    square = float(((B.T @ B) * (A @ A.T)).sum())
    norm = math.sqrt(max(square, 0.0))
    dead = int(((B == 0).all(dim=0) & (A == 0).all(dim=1)).sum())
    out, width = factors.shape
    return _Values(module, norm, norm / math.sqrt(out * width), norm == 0, factors.rank, dead)


def _warnings(values: list[_Values], facts: _Facts) -> list[str]:
    warnings = []
    zero = [value.module for value in values if value.zero]
    if len(zero) == len(values):
        warnings.append("the update is zero everywhere; the adapter is untrained.")
    elif zero:
        warnings.append(
            f"{len(zero)} of {len(values)} modules have an update of zero, such as {zero[0]}; "
            f"they are untrained."
        )
    dead = sum(value.dead for value in values)
    if dead:
        warnings.append(
            f"{dead} of {sum(value.rank for value in values)} rank-one terms are zero in both "
            f"B and A; they are padding, do nothing, and would stay zero in training."
        )
    large = [value for value in values if not value.rms <= LARGE_RMS]
    if large:
        worst = max(large, key=lambda value: value.rms)
        warnings.append(
            f"{len(large)} of {len(values)} modules have very large updates, worst "
            f"{worst.module} with entries of {worst.rms:.3g} (root mean square); training "
            f"diverged, or alpha is wrong."
        )
    if any(layer.alpha <= 0 for layer in facts.layers.values()):
        warnings.append("lora_alpha is zero or negative for some modules; probably a mistake.")
    unsure = facts.overlapping()
    if unsure:
        warnings.append(
            f"several alpha_pattern entries match {len(unsure)} modules, such as {unsure[0]}, "
            f"and the first counts; PEFT sorts them on saving, so that the scale may not be "
            f"the one of training."
        )
    return warnings


# --- the programs --------------------------------------------------------------------------


@dataclass(frozen=True)
class _Facts:
    """What the verdicts rest on."""

    directory: Path
    config: Mapping[str, Any]
    layers: Mapping[str, Layer]

    @property
    def rank(self) -> int:
        return max(layer.rank for layer in self.layers.values())

    def rewrite(self, rank: str = "max") -> str:
        """The command that writes the adapter in the form that all read alike."""
        return f"flexlora merge {shlex.quote(str(self.directory))} --rank {rank} --out NEW"

    def overlapping(self) -> list[str]:
        """The modules to which ``alpha_pattern`` gives more than one value."""
        patterns = self.config.get("alpha_pattern") or {}
        values = matched(patterns, list(self.layers), "alpha_pattern")
        return [module for module, found in values.items() if len(set(found)) > 1]

    def misscaled(self, scale: Callable[[Layer], float]) -> str:
        """Which modules a program that takes this scale gets wrong, and by how much."""
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


def _vllm_rank(facts: _Facts, consumer: str) -> Verdict:
    if facts.rank > VLLM_RANKS[-1]:
        return Verdict(
            consumer,
            "refuses",
            f"rank {facts.rank} is above its largest, {VLLM_RANKS[-1]}",
            facts.rewrite(str(VLLM_RANKS[-1])),
        )
    if facts.rank > _VLLM_DEFAULT_RANK:
        needed = next(rank for rank in VLLM_RANKS if rank >= facts.rank)
        return Verdict(consumer, "reads", f"if started with --max-lora-rank {needed}")
    return Verdict(consumer, "reads")


def _vllm_old(facts: _Facts) -> Verdict:
    """One scale, from the global r and lora_alpha, for all modules (vllm#59799)."""
    consumer = "vLLM up to 0.30.0"
    verdict = _vllm_rank(facts, consumer)
    rank, alpha = facts.config["r"], facts.config["lora_alpha"]
    scale = alpha / (math.sqrt(rank) if facts.config.get("use_rslora") else rank)
    wrong = facts.misscaled(lambda layer: scale)
    if wrong and verdict.outcome == "reads":
        why = f"it ignores rank_pattern and alpha_pattern; {wrong}"
        return Verdict(consumer, "misreads", why, facts.rewrite())
    return verdict


def _vllm_new(facts: _Facts) -> Verdict:
    return _vllm_rank(facts, "vLLM after 0.30.0")


def _llama_cpp(facts: _Facts) -> Verdict:
    """One alpha, each tensor's own rank, and no rsLoRA; an alpha of 0 counts as no scale."""
    consumer = "llama.cpp"
    alpha = facts.config["lora_alpha"]
    wrong = facts.misscaled(lambda layer: alpha / layer.rank if alpha else 1.0)
    if wrong:
        why = f"it knows neither alpha_pattern nor use_rslora; {wrong}"
        return Verdict(consumer, "misreads", why, facts.rewrite())
    if not facts.config.get("base_model_name_or_path"):
        return Verdict(consumer, "reads", "if convert_lora_to_gguf.py is given --base")
    return Verdict(consumer, "reads")


def _tensorrt_llm(facts: _Facts) -> Verdict:
    """One alpha, each tensor's own rank, and rsLoRA."""
    consumer = "TensorRT-LLM"
    alpha, rslora = facts.config["lora_alpha"], facts.config.get("use_rslora")
    wrong = facts.misscaled(lambda layer: alpha / (math.sqrt(layer.rank) if rslora else layer.rank))
    if wrong:
        why = f"it ignores alpha_pattern; {wrong}"
        return Verdict(consumer, "misreads", why, facts.rewrite())
    return Verdict(consumer, "reads", f"if max_lora_rank is at least {facts.rank}")


# --- adapters that are more than B @ A -----------------------------------------------------


def _unsupported(directory: Path, config: Mapping[str, Any], refusal: str) -> Report:
    weights = directory / WEIGHTS
    base, task = config.get("base_model_name_or_path"), config.get("task_type")
    return Report(
        directory=directory,
        base_model=base if isinstance(base, str) else None,
        task_type=task if isinstance(task, str) else None,
        bytes=weights.stat().st_size if weights.is_file() else 0,
        refusal=refusal,
        verdicts=_variant_verdicts(config),
    )


def _variant_verdicts(config: Mapping[str, Any]) -> tuple[Verdict, ...]:
    """What is known of the programs' ways with the commoner variants; else none."""
    plain = "merge it into its base model with PEFT and serve the merged model"
    init = str(config.get("init_lora_weights", True)).lower()
    if config.get("use_dora"):
        vllm = llama_cpp = "it does not support DoRA"
    elif config.get("modules_to_save"):
        vllm = "it does not support modules_to_save (later versions take classifier and score)"
        llama_cpp = "it takes no whole tensors beside the factors, but for norms"
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


def _changed_base(init: str) -> tuple[Verdict, ...]:
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


def _clean(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)
