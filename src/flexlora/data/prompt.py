"""Prompt formats: from an example to the text that the model reads and the text to learn."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from flexlora.data.corpus import Example
from flexlora.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Prompt = Callable[[Example], tuple[str, str]]
"""From an example to the texts of its prompt and its response, without an end token."""

NAMES: Final = ("alpaca", "chat", "plain")

_TODAY: Final = "26 Jul 2024"

_ALPACA_WITH_INPUT: Final = (
    "Below is an instruction that describes a task, paired with an input that provides "
    "further context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
_ALPACA: Final = (
    "Below is an instruction that describes a task. Write a response that appropriately "
    "completes the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)


def named(name: str, tokenizer: PreTrainedTokenizerBase) -> Prompt:
    """The prompt format of that name, one of ``NAMES``; ``chat`` uses the tokenizer's template.

    Raises:
        ConfigError: the name is unknown, or the tokenizer has no chat template.
    """
    if name == "chat":
        return chat(tokenizer)
    prompts: dict[str, Prompt] = {"alpaca": alpaca, "plain": plain}
    if name not in prompts:
        near = difflib.get_close_matches(name, NAMES, n=1)
        guess = f" Did you mean '{near[0]}'?" if near else ""
        raise ConfigError(
            f"There is no prompt '{name}'; set data.prompt to one of {', '.join(NAMES)}.{guess}"
        )
    return prompts[name]


def alpaca(example: Example) -> tuple[str, str]:
    """The template of Stanford Alpaca and Alpaca-LoRA, for models without a chat template.

    Raises:
        ConfigError: the example is a conversation.
    """
    _refuse_messages(example, "alpaca")
    template = _ALPACA_WITH_INPUT if example.input else _ALPACA
    prompt = template.format(instruction=example.instruction, input=example.input)
    return prompt, example.output


def plain(example: Example) -> tuple[str, str]:
    """The instruction and the input, each followed by a newline, and nothing else.

    Raises:
        ConfigError: the example is a conversation.
    """
    _refuse_messages(example, "plain")
    parts = [part for part in (example.instruction, example.input) if part]
    return "".join(f"{part}\n" for part in parts), example.output


def chat(tokenizer: PreTrainedTokenizerBase) -> Prompt:
    """The tokenizer's chat template, up to the start of the assistant's message.

    The user's message is the instruction, a blank line and the input; in a conversation the
    prompt is every message except the last. A template with a ``date_string`` (Llama 3) gets
    26 July 2024, so that a run reads the same text on every day; a template that reads the
    clock writes the day on which the examples are encoded.

    Raises:
        ConfigError: the tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        raise ConfigError(
            f"The tokenizer '{tokenizer.name_or_path}' has no chat template; set data.prompt to "
            "'alpaca' or 'plain', or model.name to a model trained for chat."
        )

    def write(example: Example) -> tuple[str, str]:
        if example.messages is None:
            parts = [part for part in (example.instruction, example.input) if part]
            messages = [{"role": "user", "content": "\n\n".join(parts)}]
        else:
            messages = list(example.messages[:-1])
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, date_string=_TODAY
        )
        return str(text), example.output

    return write


def _refuse_messages(example: Example, name: str) -> None:
    if example.messages is not None:
        raise ConfigError(
            f"The prompt '{name}' cannot format a conversation of {len(example.messages)} "
            "messages; set data.prompt to 'chat', or read columns instruction, input and output."
        )
