"""Examples as token ids: the prompt, the response, and the token that ends it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from flexlora.data.corpus import Example
from flexlora.data.prompt import Prompt
from flexlora.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Int32s = np.ndarray[Any, np.dtype[np.int32]]


@dataclass(frozen=True, eq=False)
class Tokens:
    """The token ids (n,) of one example: the prompt, the response, and its end token."""

    ids: Int32s
    prompt_tokens: int

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def prompt(self) -> Int32s:
        """The ids of the prompt."""
        return self.ids[: self.prompt_tokens]

    @property
    def response(self) -> Int32s:
        """The ids of the response."""
        return self.ids[self.prompt_tokens :]


def encode(
    example: Example, prompt: Prompt, tokenizer: PreTrainedTokenizerBase, max_tokens: int
) -> Tokens:
    """The ids of one example, at most ``max_tokens``; see ``shorten``.

    Prompt and response are tokenised separately, so that the boundary is exact and the prompt
    is the same as in generation. The prompt begins with the tokenizer's BOS if the tokenizer
    adds one itself, the text has none, and the format leaves it to the tokenizer. The response
    ends with the format's end token, by default the tokenizer's EOS.

    Raises:
        DataError: the tokenizer has no EOS, or the prompt has no tokens.
    """
    ((prompt_ids, response_ids),) = encode_all([example], prompt, tokenizer)
    ids, prompt_tokens = shorten(prompt_ids, response_ids, max_tokens)
    return Tokens(np.array(ids, np.int32), prompt_tokens)


def shorten(
    prompt: Sequence[int], response: Sequence[int], max_tokens: int
) -> tuple[list[int], int]:
    """Prompt and response in at most ``max_tokens`` ids, and the number of prompt ids.

    The response keeps up to half of ``max_tokens``, or as much as the prompt leaves free; it is
    cut at its end, the end token first, so that the model is not taught to stop in the
    middle. The prompt then loses tokens from its middle: its head has the instruction, its
    tail the marker after which the response begins.

    Raises:
        DataError: ``max_tokens`` is below 2, which leaves no room for both.
    """
    if max_tokens < 2:
        raise DataError(f"max_tokens is {max_tokens}; prompt and response need at least 2.")
    if len(prompt) + len(response) <= max_tokens:
        return [*prompt, *response], len(prompt)
    short_response = response[: max(max_tokens // 2, max_tokens - len(prompt))]
    room = min(max_tokens - len(short_response), len(prompt))
    tail = room // 2
    head = room - tail
    return [*prompt[:head], *prompt[len(prompt) - tail :], *short_response], room


def encode_all(
    examples: Sequence[Example],
    prompt: Prompt,
    tokenizer: PreTrainedTokenizerBase,
    first: int = 0,
) -> Iterator[tuple[list[int], list[int]]]:
    """Prompt ids and response ids of each example, not yet shortened.

    ``first`` is the row number of the first example, for errors.
    """
    end = eos_of(tokenizer) if prompt.end is None else prompt.end
    bos = [] if prompt.has_own_bos else bos_of(tokenizer)
    ends = {end, *prompt.closing}
    texts = [_texts(example, prompt, row) for row, example in enumerate(examples, first)]
    prompts = _ids(tokenizer, [text for text, _ in texts])
    responses = _ids(tokenizer, [text for _, text in texts])
    if prompt.has_own_bos:
        responses = _continued(texts, prompts, responses, tokenizer)
    pairs = zip(prompts, responses, strict=True)
    for row, (prompt_ids, response_ids) in enumerate(pairs, first):
        if bos and prompt_ids[:1] != bos:
            prompt_ids = bos + prompt_ids
        if not prompt_ids:
            raise DataError(
                f"The prompt of row {row + 1} has no tokens, so nothing precedes its response; "
                'give it an instruction or an input, or set data.prompt to "alpaca".'
            )
        is_ended = bool(response_ids) and response_ids[-1] in ends
        yield prompt_ids, response_ids if is_ended else [*response_ids, end]


def _continued(
    texts: Sequence[tuple[str, str]],
    prompts: Sequence[list[int]],
    responses: Sequence[list[int]],
    tokenizer: PreTrainedTokenizerBase,
) -> list[list[int]]:
    """The response ids, as they follow the prompt where a response begins with white space.

    A template that writes ``[/INST] answer`` leaves the space to the answer's first token, which
    SentencePiece writes differently at the beginning of a text.
    """
    together = {
        row: prompt + response
        for row, (prompt, response) in enumerate(texts)
        if response[:1].isspace()
    }
    ids = dict(zip(together, _ids(tokenizer, list(together.values())), strict=True))
    return [
        ids[row][len(prompt) :] if row in ids and ids[row][: len(prompt)] == prompt else response
        for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True))
    ]


def _texts(example: Example, prompt: Prompt, row: int) -> tuple[str, str]:
    """The prompt and response of a row.

    Raises:
        DataError: the format cannot write it; says which row that is.
    """
    try:
        return prompt(example)
    except DataError as error:
        first = example.messages[0]["content"] if example.messages else example.instruction
        raise DataError(f"Row {row + 1} ('{' '.join(first.split())[:40]}'): {error}") from error


def _ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    if not texts:
        return []
    encoded = tokenizer(
        texts,
        add_special_tokens=False,
        padding=False,
        truncation=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    ids: list[list[int]] = encoded["input_ids"]
    return ids


def eos_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """The tokenizer's EOS.

    Raises:
        DataError: it has none.
    """
    if not isinstance(tokenizer.eos_token_id, int):
        raise DataError(
            f"The tokenizer '{tokenizer.name_or_path}' has no end-of-sequence token; set "
            "eos_token in its tokenizer_config.json."
        )
    return tokenizer.eos_token_id


def bos_of(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The BOS in a list if the tokenizer adds one before every text, else an empty list."""
    bos = tokenizer.bos_token_id
    first = tokenizer("")["input_ids"][:1]
    return [bos] if isinstance(bos, int) and first == [bos] else []
