"""A user's own template, in Jinja."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from flexlora.data.corpus import Example
from flexlora.data.prompt import Ending, Pair, Prompt, added_tokens, ending_of, refuse_messages
from flexlora.data.prompts import chat
from flexlora.errors import ConfigError, DataError

if TYPE_CHECKING:
    from jinja2 import Template
    from jinja2.sandbox import SandboxedEnvironment
    from transformers import PreTrainedTokenizerBase

TEXTS: Final = ("instruction", "input", "output")
_TOKENS: Final = ("bos_token", "eos_token")
_OUTPUT: Final = "\0output\0"
"""Stands for the output while the template is rendered."""


def template(text: str, tokenizer: PreTrainedTokenizerBase) -> Prompt:
    """The format that a Jinja template describes; it is rendered in a sandbox.

    A template that uses ``messages`` is a chat template and treated as the tokenizer's own.
    Any other has the variables ``instruction``, ``input``, ``output``, ``bos_token``,
    ``eos_token`` and the data's other columns. The response begins where ``output`` stands, or
    at the end if the template does not use it. What the template writes after ``output`` is
    part of the response, up to the first special token; without one the response ends with the
    tokenizer's EOS.

    Raises:
        ConfigError: the text is not a template, or uses ``output`` twice.
    """
    names = variables(text)
    if "messages" in names:
        return chat.chat(tokenizer, text)
    writer = _Writer(_environment().from_string(text), "output" in names, tokenizer)
    values = {name: "x" for name in names} | {"output": _OUTPUT}
    try:
        ending = writer.cut(values)[1]
    except DataError:
        ending = Ending("", "", None)  # of values that no template has to take
    return Prompt(
        name="template",
        write=writer.write,
        source=text,
        end=ending.end,
        closing=frozenset(added_tokens(tokenizer).values()),
        has_own_bos="bos_token" in names,
    )


def variables(text: str) -> set[str]:
    """The variables that a template uses.

    Raises:
        ConfigError: it is not a template.
    """
    import jinja2
    from jinja2 import meta

    try:
        names: set[str] = meta.find_undeclared_variables(_environment().parse(text))
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(
            f"data.prompt is not a Jinja template: {error.message} (line {error.lineno}); correct "
            "that line."
        ) from error
    return names


def fields_of(text: str) -> list[str]:
    """The columns of the data that a template uses, beside instruction, input and output."""
    names = variables(text)
    return [] if "messages" in names else sorted(names - {*TEXTS, *_TOKENS})


def _environment() -> SandboxedEnvironment:
    from jinja2 import StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    return ImmutableSandboxedEnvironment(undefined=StrictUndefined)


@dataclass(frozen=True)
class _Writer:
    """Renders examples and cuts the text where the output stands."""

    template: Template
    uses_output: bool
    tokenizer: PreTrainedTokenizerBase

    def write(self, example: Example) -> Pair:
        """The texts of the prompt and the response."""
        refuse_messages(example, "template")
        texts = {"instruction": example.instruction, "input": example.input}
        prompt, ending = self.cut({**example.fields, **texts, "output": _OUTPUT})
        kept = ending.tail if ending.end is None else ending.kept
        return prompt, example.output + kept

    def cut(self, values: Mapping[str, Any]) -> tuple[str, Ending]:
        """The prompt, and the ending of the response, for these values of the variables.

        Raises:
            DataError: the template fails on the values, or uses the output more than once.
        """
        tokens = {name: getattr(self.tokenizer, name) or "" for name in _TOKENS}
        try:
            text = self.template.render({**tokens, **values})
        # A template may raise anything; none of it is a fault of this library.
        except Exception as error:
            said = str(error).strip().split("\n", 1)[0][:200] or type(error).__name__
            columns = ", ".join(name for name in values if name not in ("output", *_TOKENS))
            raise DataError(
                f'The template data.prompt cannot format the row: "{said}". It can use output and '
                f"the columns {columns}; correct the template or the row."
            ) from error
        parts = text.split(_OUTPUT)
        if len(parts) > 2 or (self.uses_output and len(parts) < 2):
            raise DataError(
                f"The template data.prompt writes output {len(parts) - 1} times as it is, so it is "
                "not clear where the response begins; write {{ output }} once, or not at all."
            )
        return parts[0], ending_of(parts[1] if len(parts) > 1 else "", self.tokenizer)
