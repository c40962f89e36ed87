"""The prompt formats, by name or by the text of an own template."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING, Final

from flexlora.data.prompt import Prompt
from flexlora.data.prompts.fixed import alpaca, plain
from flexlora.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NAMES: Final = ("alpaca", "chat", "plain")

TEMPLATE_SUFFIXES: Final = (".jinja", ".jinja2", ".j2")
"""Suffixes of files with prompt templates."""


def named(name: str, tokenizer: PreTrainedTokenizerBase) -> Prompt:
    """The prompt format of that name, one of ``NAMES``, or the one of a Jinja template's text.

    Raises:
        ConfigError: the name is unknown, the tokenizer has no chat template, or the template
            cannot be used.
    """
    from flexlora.data.prompts import chat, template

    if name == "chat":
        return chat.chat(tokenizer)
    if is_template(name):
        return template.template(name, tokenizer)
    check_name(name)
    return {"alpaca": alpaca, "plain": plain}[name]


def is_template(name: str) -> bool:
    """Whether this is the text of a Jinja template and not a name."""
    return "{{" in name or "{%" in name


def template_text(prompt: str) -> str:
    """The text of a template if ``prompt`` is the path of its file, by the suffix; else ``prompt``.

    Raises:
        ConfigError: the file cannot be read, or is no template.
    """
    if Path(prompt).suffix not in TEMPLATE_SUFFIXES or is_template(prompt):
        return prompt
    try:
        text = Path(prompt).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ConfigError(
            f"The template data.prompt = {prompt!r} cannot be read: {reason}."
        ) from error
    if not is_template(text):
        raise ConfigError(
            "The template data.prompt has no variable, such as {{ instruction }}; add "
            "those that it is to show."
        )
    return text


def fields_of(name: str) -> list[str]:
    """The columns that a format uses beside instruction, input and output: of templates only."""
    from flexlora.data.prompts import template

    return template.fields_of(name) if is_template(name) else []


def check_name(name: str) -> None:
    """Refuse what is neither a name nor a template.

    Raises:
        ConfigError: with the nearest name.
    """
    if name in NAMES or is_template(name):
        return
    near = difflib.get_close_matches(name, NAMES, n=1)
    guess = f" Did you mean '{near[0]}'?" if near else ""
    raise ConfigError(
        f"There is no prompt '{name}'; set data.prompt to one of {', '.join(NAMES)}, or to a file "
        f"with a Jinja template, such as prompt.jinja.{guess}"
    )
