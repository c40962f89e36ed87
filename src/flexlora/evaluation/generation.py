"""Greedily decoded answers of the model to prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import transformers

from flexlora.data import Example, Int32s, Prompt, encode, shorten
from flexlora.errors import ConfigError
from flexlora.evaluation import decoding, padded
from flexlora.journal import Meter
from flexlora.model import Base

_UNLIMITED: Final = 2**31 - 1
"""More tokens than any example has."""


def prompts(
    examples: Sequence[Example],
    prompt: Prompt,
    tokenizer: transformers.PreTrainedTokenizerBase,
    max_prompt_tokens: int,
) -> list[Int32s]:
    """The prompts' ids as in training, without the output.

    A prompt of more than ``max_prompt_tokens`` loses tokens from its middle, independent of
    the output's length.
    """
    full = [encode(example, prompt, tokenizer, _UNLIMITED).prompt for example in examples]
    short = [shorten(ids.tolist(), [], max_prompt_tokens)[0] for ids in full]
    return [np.array(ids, np.int32) for ids in short]


def answers_of_each(
    base: Base,
    adapters: int,
    prompts: Sequence[Int32s],
    max_new_tokens: int,
    batch_tokens: int,
    meter: Meter | None = None,
    end: int | None = None,
) -> list[list[str]]:
    """The answers of each of the attached adapters to each prompt, as text.

    ``base`` has ``adapters`` adapters attached (1 also stands for none). Greedy decoding with a
    key-value cache: no sampling, no penalties, one beam. An answer ends before the first end
    token (``end``, the prompt format's, or one of the tokenizer or of the model), or after
    ``max_new_tokens``. The text is decoded without special tokens and stripped. ``meter`` counts
    answers.

    The shared first tokens of prompts are computed once (``decoding``) where the model's rows
    can share them, and one answer is checked without a cache; other models use transformers'
    ``generate`` (``padded``). In both cases the other prompts of a batch affect an answer only by
    rounding: in float32 this is hardly ever visible, in bfloat16 two nearly equal logits may swap
    and the answers differ from that token on.

    Raises:
        ConfigError: a prompt and its answer exceed the model's context, or its attention is
            not supported.
    """
    longest = max(map(len, prompts), default=0)
    _check_context(base, longest, max_new_tokens)
    if not prompts:
        return [[] for _ in range(adapters)]
    ends = stops(base, end)
    arguments = base, prompts, max_new_tokens, ends, batch_tokens, adapters
    ids_by_adapter = None
    if base.decodes(longest + max_new_tokens):
        ids_by_adapter = decoding.checked(*arguments, meter)
    if ids_by_adapter is None:
        ids_by_adapter = padded.decode(*arguments, meter)
    return [[text(base.tokenizer, ids, ends) for ids in answers] for answers in ids_by_adapter]


def exact_match(reference: str, answer: str) -> bool:
    """Whether the two are equal, ignoring case and surrounding white space.

    Punctuation, articles and inner white space count.
    """
    return answer.strip().casefold() == reference.strip().casefold()


def text(
    tokenizer: transformers.PreTrainedTokenizerBase, ids: Sequence[int], ends: Sequence[int]
) -> str:
    """The text of the ids up to the first of ``ends``, stripped."""
    end = next((index for index, token in enumerate(ids) if token in ends), len(ids))
    decoded = tokenizer.decode(
        list(ids[:end]), skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return str(decoded).strip()


def stops(base: Base, end: int | None) -> list[int]:
    """The tokens that end an answer: the one of the training first, then the model's.

    ``end`` is that of the prompt format, None for the tokenizer's EOS.
    """
    config: Any = base.model.generation_config
    model_eos = config.eos_token_id if config is not None else None
    model_ends = model_eos if isinstance(model_eos, list) else [model_eos]
    tokens = [end, base.tokenizer.eos_token_id, *model_ends]
    return list(dict.fromkeys(token for token in tokens if token is not None))


def _check_context(base: Base, longest: int, max_new_tokens: int) -> None:
    config: Any = base.model.config
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if context is not None and longest + max_new_tokens > context:
        raise ConfigError(
            f"A prompt of {longest} tokens and {max_new_tokens} new tokens exceed the {context} "
            f"positions of {base.name}; lower evaluation.max_prompt_tokens or "
            "evaluation.max_new_tokens."
        )
