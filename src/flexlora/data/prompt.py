"""What a prompt format is: from an example to the text the model reads and the text to learn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from flexlora.data.corpus import Example
from flexlora.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Pair = tuple[str, str]
"""The text of a prompt and that of its response."""


@dataclass(frozen=True)
class Prompt:
    """A prompt format; calling it writes the texts of an example's prompt and response.

    ``end`` is the id of the token that ends a response and at which generation stops, None for
    the tokenizer's EOS. A response whose text already ends with it, or with one of ``closing``,
    gets no other. ``has_own_bos``: the prompt begins as its text says; else it begins with the
    tokenizer's BOS if the tokenizer adds one to every text. ``source`` is all that the texts
    depend on beside the example. ``notices`` are sentences for the user.
    """

    name: str
    write: Callable[[Example], Pair]
    source: str = ""
    end: int | None = None
    closing: frozenset[int] = frozenset()
    has_own_bos: bool = False
    notices: tuple[str, ...] = ()

    def __call__(self, example: Example) -> Pair:
        """The texts of the prompt and the response, without an end token that is not text.

        Raises:
            DataError: a template cannot format the example.
            ConfigError: the format does not suit examples of this kind.
        """
        return self.write(example)


def refuse_messages(example: Example, name: str) -> None:
    """Refuse a conversation.

    Raises:
        ConfigError: the example is one.
    """
    if example.messages is not None:
        raise ConfigError(
            f"The prompt '{name}' cannot format a conversation of {len(example.messages)} "
            "messages; set data.prompt to 'chat' or to a template of your own such as 'mine.jinja' "
            "(docs/data.md), or read columns instruction, input and output."
        )


@dataclass(frozen=True)
class Ending:
    """How a format ends a response.

    ``tail`` is all that it writes after an answer, ``kept`` the part up to and including the
    first token that is one of the tokenizer's added ones; that token's id is ``end``. Without
    such a token ``kept`` is empty and ``end`` None: a response ends with the tokenizer's EOS.
    """

    tail: str
    kept: str
    end: int | None


def ending_of(tail: str, tokenizer: PreTrainedTokenizerBase) -> Ending:
    """The ending in the text after an answer."""
    places = [(tail.find(token), -len(token), token) for token in added_tokens(tokenizer)]
    first = min((place for place in places if place[0] >= 0), default=None)
    if first is None:
        return Ending(tail, "", None)
    position, _, token = first
    return Ending(tail, tail[: position + len(token)], added_tokens(tokenizer)[token])


def added_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """The id of every token that is never split, such as ``<|im_end|>``, by its text."""
    tokens = {str(token): id for id, token in tokenizer.added_tokens_decoder.items()}
    special = zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
    return {**tokens, **dict(special)}


TODAY: Final = "26 Jul 2024"
"""The date that templates print, so that a run reads the same text on every day."""
