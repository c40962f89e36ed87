"""Reading and writing the directories in which PEFT keeps LoRA adapters."""

from flexlora.peft_directory.config import CONFIG, Unsupported, read_config
from flexlora.peft_directory.patterns import matched
from flexlora.peft_directory.reading import (
    DTYPES,
    WEIGHTS,
    Layer,
    PeftAdapter,
    Span,
    StoredFactors,
    read,
)
from flexlora.peft_directory.writing import CARD, VLLM_RANKS, targets, write

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
    "matched",
    "read",
    "read_config",
    "targets",
    "write",
]
