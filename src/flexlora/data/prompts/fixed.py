"""The formats that depend on no tokenizer: ``alpaca`` and ``plain``."""

from __future__ import annotations

from typing import Final

from flexlora.data.corpus import Example
from flexlora.data.prompt import Pair, Prompt, refuse_messages

_ALPACA_WITH_INPUT: Final = (
    "Below is an instruction that describes a task, paired with an input that provides "
    "further context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
_ALPACA: Final = (
    "Below is an instruction that describes a task. Write a response that appropriately "
    "completes the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)


def _alpaca(example: Example) -> Pair:
    refuse_messages(example, "alpaca")
    template = _ALPACA_WITH_INPUT if example.input else _ALPACA
    prompt = template.format(instruction=example.instruction, input=example.input)
    return prompt, example.output


def _plain(example: Example) -> Pair:
    refuse_messages(example, "plain")
    parts = [part for part in (example.instruction, example.input) if part]
    return "".join(f"{part}\n" for part in parts), example.output


alpaca: Final = Prompt("alpaca", _alpaca, source=_ALPACA_WITH_INPUT + _ALPACA)
"""The template of Stanford Alpaca and Alpaca-LoRA, for models without a chat template."""

plain: Final = Prompt("plain", _plain)
"""The instruction and the input, each followed by a newline, and nothing else."""
