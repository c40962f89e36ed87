"""Reading, writing, checking and merging the directories in which PEFT stores LoRA adapters."""

from flexlora.peft_format.compatibility import check
from flexlora.peft_format.config import Unsupported, read_config
from flexlora.peft_format.layouts import CONFIG, WEIGHTS, locate
from flexlora.peft_format.merging import MergedModule, MergeResult, merge, parse_rank
from flexlora.peft_format.patterns import matched, whole_matches
from flexlora.peft_format.reading import Layer, PeftAdapter, StoredFactors, read
from flexlora.peft_format.report import Report, Verdict
from flexlora.peft_format.targets import ends_of, targets
from flexlora.peft_format.writing import CARD, VLLM_RANKS, check_target, write

__all__ = [
    "CARD",
    "CONFIG",
    "VLLM_RANKS",
    "WEIGHTS",
    "Layer",
    "MergeResult",
    "MergedModule",
    "PeftAdapter",
    "Report",
    "StoredFactors",
    "Unsupported",
    "Verdict",
    "check",
    "check_target",
    "ends_of",
    "locate",
    "matched",
    "merge",
    "parse_rank",
    "read",
    "read_config",
    "targets",
    "whole_matches",
    "write",
]
