"""Greedy decoding by transformers' own ``generate``, in batches padded on the left."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from flexlora.data import Int32s
from flexlora.model import Base


def decode(
    base: Base,
    prompts: Sequence[Int32s],
    max_new_tokens: int,
    stops: Sequence[int],
    batch_tokens: int,
    parts: int = 1,
) -> list[list[list[int]]]:
    """What ``decoding.decode`` finds, for models whose attention is not the default one.

    Every part of a batch holds the same prompts. A batch ends with its longest answer, and
    an answer that ended earlier is followed by stop tokens.
    """
    found: list[list[list[int]]] = [[[] for _ in prompts] for _ in range(parts)]
    lengths = [len(ids) for ids in prompts]
    with _plain_settings(base), torch.inference_mode():
        for rows in batches(lengths, max_new_tokens, batch_tokens // parts):
            new = _continued(base, [prompts[row] for row in rows], max_new_tokens, stops, parts)
            for part, answers in enumerate(new.view(parts, len(rows), -1).tolist()):
                for row, ids in zip(rows, answers, strict=True):
                    found[part][row] = ids
    return found


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
    base: Base, prompts: Sequence[Int32s], max_new_tokens: int, stops: Sequence[int], parts: int
) -> Tensor:
    """The new ids (parts * prompts, at most ``max_new_tokens``) after each prompt."""
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
        eos_token_id=list(stops),
        pad_token_id=stops[0],
    )
    model: Any = base.model
    whole: Tensor = model.generate(
        input_ids.repeat(parts, 1).to(base.device),
        attention_mask=mask.repeat(parts, 1).to(base.device),
        generation_config=config,
    )
    return whole[:, longest:]


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
