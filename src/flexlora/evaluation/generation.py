"""What the model writes by itself: greedy answers to prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, cast

import numpy as np
import transformers

from flexlora.data import Example, Int32s, Prompt, encode, shorten
from flexlora.errors import ConfigError
from flexlora.evaluation import decoding, padded
from flexlora.model import Base
from flexlora.model.layers import attention

_WHOLE: Final = 2**31 - 1


def prompts(
    examples: Sequence[Example],
    prompt: Prompt,
    tokenizer: transformers.PreTrainedTokenizerBase,
    max_prompt_tokens: int,
) -> list[Int32s]:
    """The ids that the model reads before it writes, as in training and without the output.

    A prompt of more than ``max_prompt_tokens`` loses tokens from its middle, whatever the
    output's length.
    """
    whole = [encode(example, prompt, tokenizer, _WHOLE).prompt for example in examples]
    short = [shorten(ids.tolist(), [], max_prompt_tokens)[0] for ids in whole]
    return [np.array(ids, np.int32) for ids in short]


def answers(
    base: Base, prompts: Sequence[Int32s], max_new_tokens: int, batch_tokens: int
) -> list[str]:
    """``answers_of_each`` of the one adapter, or of none, that the model has now."""
    return answers_of_each(base, 1, prompts, max_new_tokens, batch_tokens)[0]


def answers_of_each(
    base: Base,
    adapters: int,
    prompts: Sequence[Int32s],
    max_new_tokens: int,
    batch_tokens: int,
) -> list[list[str]]:
    """What the model writes after each prompt with each of the adapters attached to it.

    ``base`` has so many ``adapters`` attached (one also stands for none). Greedy decoding
    with a key-value cache: no sampling, no penalties, one beam. An answer ends before the
    first end token (the tokenizer's or one of the model's own), or after
    ``max_new_tokens``. No reference is looked at. The text is decoded without special
    tokens and stripped.

    Tokens that prompts share at their beginning are computed once (``decoding``); a model
    that was loaded with another attention than the default generates by transformers, in
    padded batches (``padded``). Either way an answer does not depend on its neighbours but
    through rounding: in float32 that hardly ever shows, in bfloat16 two near-equal logits
    may change places and the answers part from there.

    Raises:
        ConfigError: a prompt and its answer would not fit the model's context.
    """
    longest = max(map(len, prompts), default=0)
    _check_context(base, longest, max_new_tokens)
    if not prompts:
        return [[] for _ in range(adapters)]
    ends, config = stops(base), cast(Any, base.model.config)
    own = config._attn_implementation == attention.NAME
    decode = decoding.decode if own else padded.decode
    written = decode(base, prompts, max_new_tokens, ends, batch_tokens, adapters)
    return [[text(base.tokenizer, ids, ends) for ids in part] for part in written]


def exact_match(reference: str, answer: str) -> bool:
    """Whether the two are equal but for case (folded) and white space around them.

    Punctuation, articles and inner white space count.
    """
    return answer.strip().casefold() == reference.strip().casefold()


def text(
    tokenizer: transformers.PreTrainedTokenizerBase, ids: Sequence[int], ends: Sequence[int]
) -> str:
    """The answer in the ids that the model wrote: up to the first of ``ends``, stripped."""
    end = next((place for place, token in enumerate(ids) if token in ends), len(ids))
    written = tokenizer.decode(
        list(ids[:end]), skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return str(written).strip()


def stops(base: Base) -> list[int]:
    """The tokens that end an answer: the one trained on first, then the model's own."""
    config: Any = base.model.generation_config
    own = config.eos_token_id if config is not None else None
    tokens = [base.tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
    return list(dict.fromkeys(token for token in tokens if token is not None))


def _check_context(base: Base, longest: int, max_new_tokens: int) -> None:
    config: Any = base.model.config
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if context is not None and longest + max_new_tokens > context:
        raise ConfigError(
            f"A prompt of {longest} tokens and {max_new_tokens} new ones exceed the "
            f"{context} positions of {base.name}; lower evaluation.max_prompt_tokens or "
            "evaluation.max_new_tokens."
        )
