"""The tokenizer's chat template, or one of the same form."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from flexlora.data.conversation import Message
from flexlora.data.corpus import Example
from flexlora.data.prompt import TODAY, Ending, Pair, Prompt, added_tokens, ending_of
from flexlora.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_QUESTION, _ANSWER = "xQUESTIONx", "xANSWERx"
_THINK: Final = "<think>"


def chat(tokenizer: PreTrainedTokenizerBase, template: str | None = None) -> Prompt:
    """The tokenizer's chat template (or ``template``), up to the start of the assistant's answer.

    The user's message is the instruction, a blank line and the input; in a conversation the
    prompt is every message except the last. The response is what the template writes for the
    assistant's message: it ends with the template's first special token after the answer, such
    as ``<|im_end|>``, or with the tokenizer's EOS if the template ends a turn with none. What
    the template itself writes before an answer, such as an empty ``<think>`` block, belongs to
    the prompt. A ``date_string`` (Llama 3) is 26 July 2024, so that a run reads the same text
    on every day; a template that reads the clock writes the day on which examples are encoded.

    Raises:
        ConfigError: the tokenizer has no chat template, or it does not write an answer once.
    """
    if template is None and not tokenizer.chat_template:
        raise ConfigError(
            f"The tokenizer '{tokenizer.name_or_path}' has no chat template; set "
            "model.name to a model trained for chat, data.prompt to 'mine.jinja', a template of "
            "your own (docs/data.md), or, for rows that are no conversations, to 'alpaca' or "
            "'plain'."
        )
    probe = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}]
    name = "data.prompt" if template else f"the tokenizer '{tokenizer.name_or_path}'"
    renderer = _Renderer(tokenizer, template, name)
    try:
        text = renderer.text(probe, None, False)
        before = renderer.text(probe[:1], None, True)
    except DataError as error:
        raise ConfigError(f"{error}") from error
    if text.count(_ANSWER) != 1:
        raise ConfigError(
            f"The chat template of {name} writes an assistant's answer {text.count(_ANSWER)} times "
            "and not once; set data.prompt to 'alpaca', or to a template of your own."
        )
    start, tail = text.split(_ANSWER)
    ending = ending_of(tail, tokenizer)
    writer = _Writer(renderer, ending)
    return Prompt(
        name="chat",
        write=writer.write,
        source=str(template or tokenizer.chat_template),
        end=ending.end,
        closing=frozenset(added_tokens(tokenizer).values()),
        has_own_bos=True,
        notices=_notices(name, start, before),
    )


@dataclass(frozen=True)
class _Renderer:
    """Renders conversations; ``name`` says whose template it is."""

    tokenizer: PreTrainedTokenizerBase
    template: str | None
    name: str

    def text(self, messages: Sequence[Message], tools: Any, asks: bool) -> str:
        """The conversation's text; ``asks``: up to where the assistant answers.

        Raises:
            DataError: the template refuses the messages, or fails on them.
        """
        try:
            text = self.tokenizer.apply_chat_template(
                self._known_roles(messages),
                tools=tools,
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=asks,
                date_string=TODAY,
            )
        # A template is a program of others, which may raise anything.
        except Exception as error:
            said = str(error).strip().split("\n", 1)[0][:200] or type(error).__name__
            raise DataError(
                f'The chat template of {self.name} cannot format the conversation: "{said}"; '
                f"{_remedy(messages, tools)}."
            ) from error
        return str(text)

    def _known_roles(self, messages: Sequence[Message]) -> list[Message]:
        """The messages, in which ``developer`` is ``system`` if the template does not know it."""
        if "developer" in str(self.template or self.tokenizer.chat_template):
            return list(messages)
        return [
            {**message, "role": "system"} if message["role"] == "developer" else message
            for message in messages
        ]


def _remedy(messages: Sequence[Message], tools: Any) -> str:
    """What to do about a conversation that a template refuses."""
    roles = [message["role"] for message in messages]
    remedies = []
    if {"system", "developer"} & set(roles):
        remedies.append("put the text of the system message at the start of the first user message")
    if any(one == other for one, other in itertools.pairwise(roles)):
        remedies.append("join messages of the same role that follow each other")
    if tools or any("tool_calls" in message or message["role"] == "tool" for message in messages):
        remedies.append("leave out tool calls and tools, which not every template knows")
    others = "set data.prompt to a template of your own"
    return ", or ".join([*remedies, others])


@dataclass(frozen=True)
class _Writer:
    """Cuts a rendered conversation into prompt and response."""

    renderer: _Renderer
    ending: Ending

    def write(self, example: Example) -> Pair:
        """The texts of the prompt and the response, the latter with its end token."""
        if example.messages is None:
            parts = [part for part in (example.instruction, example.input) if part]
            messages: tuple[Message, ...] = (
                {"role": "user", "content": "\n\n".join(parts)},
                {"role": "assistant", "content": example.output},
            )
        else:
            messages = example.messages
        tools = None if example.tools is None else list(example.tools)
        prompt = self.renderer.text(messages[:-1], tools, True)
        whole = self.renderer.text(messages, tools, False)
        answer = messages[-1]["content"]
        has_text_only = messages[-1].keys() <= {"role", "content", "name"}
        if has_text_only and (pair := self._split(prompt, whole, answer)):
            return pair
        return self._rest(prompt, whole, answer)

    def _split(self, prompt: str, whole: str, answer: str) -> Pair | None:
        """The pair if the text ends with the answer, in which a template may trim spaces."""
        for written in dict.fromkeys((answer, answer.strip(), answer.rstrip(), answer.lstrip())):
            if not whole.endswith(written + self.ending.tail):
                continue
            before = whole[: len(whole) - len(written + self.ending.tail)]
            response = written + self.ending.kept
            if before.startswith(prompt):
                opening = before[len(prompt) :]
                # White space belongs to the answer's first token, a block of its own does not.
                return (before, response) if opening.strip() else (prompt, opening + response)
            if prompt.startswith(before):
                return (before if prompt[len(before) :].strip() else prompt), response
        return None

    def _rest(self, prompt: str, whole: str, answer: str) -> Pair:
        """The pair if the template writes the answer in another form, such as a tool call."""
        if whole.startswith(prompt):
            rest = whole[len(prompt) :]
            if self.ending.tail and rest.endswith(self.ending.tail):
                return prompt, rest[: -len(self.ending.tail)] + self.ending.kept
            return prompt, rest.rstrip()
        # The template lets the model think, and drops the thoughts of turns that are over.
        if prompt.rstrip().endswith(_THINK) and answer.lstrip().startswith(_THINK):
            return prompt, answer.lstrip()[len(_THINK) :].lstrip("\n") + self.ending.kept
        raise DataError(
            f"The chat template of {self.renderer.name} writes this conversation differently when "
            f"it ends with the answer ({whole[-60:]!r}) than when it asks for one "
            f"({prompt[-60:]!r}), so what the answer is cannot be told; set data.prompt to a "
            "template of your own."
        )


def _notices(name: str, start: str, before: str) -> tuple[str, ...]:
    """What a user has to know to ask a trained model as it was trained."""
    opening = start[len(before) :] if start.startswith(before) else ""
    if opening.strip():
        return (
            f"The chat template of {name} writes {opening!r} before an answer. It is part of the "
            "prompts here; ask a trained model with it too (for most templates with "
            "enable_thinking=False).",
        )
    if before.startswith(start) and before[len(start) :].strip():
        return (
            f"The chat template of {name} asks with {before[len(start) :]!r}, which it leaves out "
            "of a conversation that has the answer; answers without it are learnt without it.",
        )
    return ()
