"""Reading and writing the directories in which PEFT keeps LoRA adapters."""

from flexlora.peft_format.compatibility import check
from flexlora.peft_format.config import CONFIG, Unsupported, read_config
from flexlora.peft_format.merging import merge, parse_rank
from flexlora.peft_format.patterns import matched
from flexlora.peft_format.reading import (
    DTYPES,
    WEIGHTS,
    Layer,
    PeftAdapter,
    Span,
    StoredFactors,
    read,
)
from flexlora.peft_format.writing import CARD, VLLM_RANKS, targets, write

__all__ = [
    "CARD",
    "CONFIG",
    "DTYPES",
    "VLLM_RANKS",
    "WEIGHTS",
    "Layer",
    "PeftAdapter",
    "Span",
    "StoredFactors",
    "Unsupported",
    "check",
    "matched",
    "merge",
    "parse_rank",
    "read",
    "read_config",
    "targets",
    "write",
]
