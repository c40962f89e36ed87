"""How many clients train at the same time: by memory, and by what a longer row gains."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import torch

from flexlora.data import Forest, Pack, TokenStore, pack
from flexlora.model import Base
from flexlora.training.optimizer import Training

_SHORTEST_ROW: Final = 32
_WORTH: Final = 1.1
"""A row twice as long must give so many times the tokens a second to be worth it."""

_LOOKED_AT: Final = 16
_SHARE_OF_MEMORY: Final = 0.5


def clients_at_once(
    base: Base,
    store: TokenStore,
    rows: Iterable[Sequence[int]],
    settings: Training,
    parameters: int,
    most: int,
) -> int:
    """How many clients to train together, of at most ``most``.

    As many as fill a row up to the length from which the base model gains nothing more
    (measured here, in a second or so), as far as half of the free memory holds that many
    adapters of ``parameters`` numbers with all that training them takes. ``rows`` are those
    of the clients, of which the first few are looked at.
    """
    taken = [
        pack(store, held[: settings.batch_examples], share=base.shares).tokens
        for held, _ in zip(rows, range(_LOOKED_AT), strict=False)
        if len(held)
    ]
    if not taken or most < 2:
        return 1
    wanted = math.ceil(saturation(base, settings.pack_tokens) / float(np.mean(taken)))
    held = _SHARE_OF_MEMORY * free_bytes(base.device) // bytes_to_train(parameters, settings)
    return max(1, min(wanted, int(held), most))


def bytes_to_train(parameters: int, settings: Training) -> int:
    """What one client takes: values, gradients, moments, and what it returns twice."""
    moments = 2 if settings.optimizer == "adamw" else int(settings.momentum > 0)
    return 4 * max(parameters, 1) * (2 + moments + 2)


def saturation(base: Base, most_tokens: int) -> int:
    """The shortest row, doubling from 32 tokens, beyond which tokens a second hardly grow."""
    tokens, speed = _SHORTEST_ROW, _tokens_per_second(base, _SHORTEST_ROW)
    while 2 * tokens <= most_tokens:
        longer = _tokens_per_second(base, 2 * tokens)
        if longer < _WORTH * speed:
            break
        tokens, speed = 2 * tokens, longer
    return tokens


def free_bytes(device: torch.device) -> float:
    """The memory that can be had without swapping; infinite where the system does not say."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    facts = Path("/proc/meminfo")
    if facts.exists():
        lines = dict(line.split(":", 1) for line in facts.read_text().splitlines())
        return 1024.0 * int(lines["MemAvailable"].split()[0])
    if "SC_AVPHYS_PAGES" in os.sysconf_names:
        return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return math.inf


def _tokens_per_second(base: Base, tokens: int) -> float:
    """Of one pass through the base model, the faster of two."""
    places = torch.arange(tokens)
    row = Pack(
        input_ids=torch.ones(1, tokens, dtype=torch.int64),
        position_ids=places[None],
        forest=Forest((0, tokens), (-1,)),
        loss_positions=places[-1:],
        labels=places[-1:],
        owners=torch.zeros(1, dtype=torch.int64),
    )
    seconds = []
    for _ in range(2):
        started = time.perf_counter()
        with torch.inference_mode():
            float(base.logits(row).sum())  # the number is waited for
        seconds.append(time.perf_counter() - started)
    return tokens / min(seconds)
