"""Greedy decoding by transformers' ``generate``, in batches of prompts of one length."""

from __future__ import annotations

import itertools
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
    """The same as ``decoding.decode``, for models whose rows cannot share tokens.

    A batch has prompts of one length, as not every model ignores padding on the left, and one
    adapter. It ends with its longest answer, and an answer that ends earlier is followed by stop
    tokens.
    """
    answers: list[list[list[int]]] = [[[] for _ in prompts] for _ in range(adapters)]
    lengths = [len(ids) for ids in prompts]
    with _default_settings(base), torch.inference_mode():
        for rows in batches(lengths, max_new_tokens, batch_tokens):
            batch = np.stack([prompts[row] for row in rows])
            for adapter in range(adapters):
                with base.only(adapter):
                    new = _continued(base, batch, max_new_tokens, stops)
                for row, ids in zip(rows, new.tolist(), strict=True):
                    answers[adapter][row] = ids
            if meter is not None:
                meter.advance(adapters * len(rows))
    return answers


def batches(lengths: Sequence[int], max_new_tokens: int, batch_tokens: int) -> list[list[int]]:
    """Batches of prompts of one length, the longest first, as indices into ``lengths``.

    A batch has (rows) x (its prompts' length + ``max_new_tokens``) <= ``batch_tokens``, unless
    a single row needs more. The longest prompts come first, so that insufficient memory shows
    at the start.
    """
    order = np.argsort(-np.asarray(lengths, np.int64), kind="stable").tolist()
    result = []
    for length, equal in itertools.groupby(order, key=lambda row: lengths[row]):
        rows, members = max(1, batch_tokens // (length + max_new_tokens)), list(equal)
        result += [members[first : first + rows] for first in range(0, len(members), rows)]
    return result


def _continued(base: Base, prompts: Int32s, max_new_tokens: int, stops: Sequence[int]) -> Tensor:
    """The new ids (prompts, at most ``max_new_tokens``) after the ``prompts`` (prompts, tokens)."""
    input_ids = torch.from_numpy(prompts.astype(np.int64)).to(base.device)
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
        input_ids, attention_mask=torch.ones_like(input_ids), generation_config=config
    )
    return ids_with_prompts[:, input_ids.shape[1] :]


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
