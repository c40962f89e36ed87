"""Greedy decoding by transformers' ``generate``, in batches padded on the left."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from flexlora.data import Int32s
from flexlora.journal import Meter
from flexlora.model import Base


def decode(
    base: Base,
    prompts: Sequence[Int32s],
    max_new_tokens: int,
    stops: Sequence[int],
    batch_tokens: int,
    adapters: int = 1,
    meter: Meter | None = None,
) -> list[list[list[int]]]:
    """The same as ``decoding.decode``, for models that use another attention than the default.

    In a batch every adapter has the same prompts. A batch ends with its longest answer, and an
    answer that ends earlier is followed by stop tokens.
    """
    answers: list[list[list[int]]] = [[[] for _ in prompts] for _ in range(adapters)]
    lengths = [len(ids) for ids in prompts]
    with _default_settings(base), torch.inference_mode():
        for rows in batches(lengths, max_new_tokens, batch_tokens // adapters):
            batch = [prompts[row] for row in rows]
            new = _continued(base, batch, max_new_tokens, stops, adapters)
            for adapter, batch_answers in enumerate(new.view(adapters, len(rows), -1).tolist()):
                for row, ids in zip(rows, batch_answers, strict=True):
                    answers[adapter][row] = ids
            if meter is not None:
                meter.advance(adapters * len(rows))
    return answers


def batches(lengths: Sequence[int], max_new_tokens: int, batch_tokens: int) -> list[list[int]]:
    """Batches of prompts of similar length, the longest first, as indices into ``lengths``.

    A batch has (rows) x (its longest prompt + ``max_new_tokens``) <= ``batch_tokens``, unless
    a single row needs more. The largest batch comes first, so that insufficient memory shows
    at the start.
    """
    order = np.argsort(-np.asarray(lengths, np.int64), kind="stable").tolist()
    result = []
    while order:
        rows = max(1, batch_tokens // (lengths[order[0]] + max_new_tokens))
        result.append(order[:rows])
        order = order[rows:]
    return result


def _continued(
    base: Base, prompts: Sequence[Int32s], max_new_tokens: int, stops: Sequence[int], adapters: int
) -> Tensor:
    """The new ids (adapters * prompts, at most ``max_new_tokens``) after each prompt."""
    longest = max(len(ids) for ids in prompts)
    # The padding may be any token: it is masked in the prompt, and cut off in the answer.
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
        eos_token_id=list(stops),
        pad_token_id=stops[0],
    )
    model: Any = base.model
    ids_with_prompts: Tensor = model.generate(
        input_ids.repeat(adapters, 1).to(base.device),
        attention_mask=mask.repeat(adapters, 1).to(base.device),
        generation_config=config,
    )
    return ids_with_prompts[:, longest:]


@contextmanager
def _default_settings(base: Base) -> Iterator[None]:
    """Use the default decoding settings within the context, instead of the model's own.

    ``generate`` would take settings such as a repetition penalty from the published model, and
    the scores of two models would not be comparable.
    """
    published = base.model.generation_config
    default = transformers.GenerationConfig()  # type: ignore[no-untyped-call]
    base.model.generation_config = default
    try:
        yield
    finally:
        base.model.generation_config = published
