"""What the model writes by itself: greedy answers to prompts, in padded batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import numpy as np
import torch
import transformers
from torch import Tensor

from flexlora.data.corpus import Example
from flexlora.data.prompt import Prompt
from flexlora.data.tokens import Int32s, encode, shorten
from flexlora.model import Base

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
    """What the model, with the adapter it has now, writes after each prompt, in their order.

    Greedy decoding with a key-value cache: no sampling, no penalties, one beam. An answer
    ends before the first end token (the tokenizer's or one of the model's own), or after
    ``max_new_tokens``; a batch ends with its longest answer. No reference is looked at. The
    text is decoded without special tokens and stripped.

    Batches are padded on the left and masked, so an answer does not depend on its
    neighbours but through rounding: in float32 that hardly ever shows, in bfloat16 two
    near-equal logits may change places and the answers part from there.

    Raises:
        ValueError: a prompt and its answer would not fit the model's context.
    """
    lengths = [len(ids) for ids in prompts]
    _check_context(base, max(lengths, default=0), max_new_tokens)
    stops = _stops(base)
    written = [""] * len(prompts)
    with _plain_settings(base), torch.inference_mode():
        for rows in batches(lengths, max_new_tokens, batch_tokens):
            new = _continued(base, [prompts[row] for row in rows], max_new_tokens, stops)
            for row, ids in zip(rows, new.tolist(), strict=True):
                written[row] = _text(base, ids, stops)
    return written


def exact_match(reference: str, answer: str) -> bool:
    """Whether the two are equal but for case (folded) and white space around them.

    Punctuation, articles and inner white space count.
    """
    return answer.strip().casefold() == reference.strip().casefold()


def batches(lengths: Sequence[int], max_new_tokens: int, batch_tokens: int) -> list[list[int]]:
    """Prompts of like length together, the longest first, as indices into ``lengths``.

    A batch takes (rows) x (its longest prompt + ``max_new_tokens``) <= ``batch_tokens``,
    unless one row alone takes more. The largest comes first: if memory does not suffice,
    that is known at once.
    """
    order = np.argsort(-np.asarray(lengths, np.int64), kind="stable").tolist()
    found = []
    while order:
        rows = max(1, batch_tokens // (lengths[order[0]] + max_new_tokens))
        found.append(order[:rows])
        order = order[rows:]
    return found


def _continued(
    base: Base, prompts: Sequence[Int32s], max_new_tokens: int, stops: list[int]
) -> Tensor:
    """The new ids (prompts, at most ``max_new_tokens``) after each prompt."""
    longest = max(len(ids) for ids in prompts)
    # What stands in the padding does not matter: it is masked before, and cut off after.
    input_ids = torch.full((len(prompts), longest), stops[0])
    mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(prompts):
        input_ids[row, longest - len(ids) :] = torch.from_numpy(ids.astype(np.int64))
        mask[row, longest - len(ids) :] = 1
    config = transformers.GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=False,
        num_beams=1,
        use_cache=True,
        max_new_tokens=max_new_tokens,
        eos_token_id=stops,
        pad_token_id=stops[0],
    )
    model: Any = base.model
    whole: Tensor = model.generate(
        input_ids.to(base.device),
        attention_mask=mask.to(base.device),
        generation_config=config,
    )
    return whole[:, longest:]


def _text(base: Base, ids: list[int], stops: list[int]) -> str:
    end = next((place for place, token in enumerate(ids) if token in stops), len(ids))
    text = base.tokenizer.decode(
        ids[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return str(text).strip()


def _stops(base: Base) -> list[int]:
    """The tokens that end an answer: the one trained on first, then the model's own."""
    config: Any = base.model.generation_config
    own = config.eos_token_id if config is not None else None
    tokens = [base.tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
    return list(dict.fromkeys(token for token in tokens if token is not None))


@contextmanager
def _plain_settings(base: Base) -> Iterator[None]:
    """The model without the decoding settings that it was published with.

    ``generate`` takes from them whatever it is not told, such as a repetition penalty, and
    scores of two models would not mean the same.
    """
    published = base.model.generation_config
    plain = transformers.GenerationConfig()  # type: ignore[no-untyped-call]
    base.model.generation_config = plain
    try:
        yield
    finally:
        base.model.generation_config = published


def _check_context(base: Base, longest: int, max_new_tokens: int) -> None:
    config: Any = base.model.config
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if context is not None and longest + max_new_tokens > context:
        raise ValueError(
            f"A prompt of {longest} tokens and {max_new_tokens} new ones exceed the "
            f"{context} positions of {base.name}; lower evaluation.max_prompt_tokens or "
            "evaluation.max_new_tokens."
        )
