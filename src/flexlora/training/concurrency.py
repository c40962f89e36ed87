"""How many clients train at the same time, from the free memory and the gain of longer rows."""

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
"""Tokens of the shortest row that is measured."""

_LEAST_SPEEDUP: Final = 1.1
"""How much faster, in tokens per second, a row of double length must be."""

_SAMPLED_CLIENTS: Final = 16
_SHARE_OF_MEMORY: Final = 0.5


def clients_at_once(
    base: Base,
    store: TokenStore,
    rows: Iterable[Sequence[int]],
    settings: Training,
    parameters: int,
    most: int,
) -> int:
    """The number of clients to train together, at most ``most``.

    As many as fill a row of the length beyond which the base model is hardly faster (measured
    in about a second), but no more than fit in half of the free memory with the training state
    of an adapter of ``parameters`` parameters each. ``rows`` are the rows of each client; the
    first 16 clients are sampled for the tokens of a step.
    """
    tokens_per_client = [
        pack(store, own[: settings.batch_examples], share=base.shares_prefixes).tokens
        for own, _ in zip(rows, range(_SAMPLED_CLIENTS), strict=False)
        if len(own)
    ]
    if not tokens_per_client or most < 2:
        return 1
    useful = math.ceil(saturation(base, settings.pack_tokens) / float(np.mean(tokens_per_client)))
    fitting = room_bytes(base.device) // bytes_to_train(parameters, settings)
    return max(1, min(useful, int(fitting), most))


def bytes_to_train(parameters: int, settings: Training) -> int:
    """The bytes of one client's training: parameters, gradients, moments, and two results."""
    moments = 2 if settings.optimizer == "adamw" else int(settings.momentum > 0)
    return 4 * max(parameters, 1) * (2 + moments + 2)


def saturation(base: Base, most_tokens: int) -> int:
    """The row length in tokens, doubling from 32, beyond which tokens per second hardly grow."""
    tokens, speed = _SHORTEST_ROW, _tokens_per_second(base, _SHORTEST_ROW)
    while 2 * tokens <= most_tokens:
        longer = _tokens_per_second(base, 2 * tokens)
        if longer < _LEAST_SPEEDUP * speed:
            break
        tokens, speed = 2 * tokens, longer
    return tokens


def room_bytes(device: torch.device) -> float:
    """The memory for the training state of all who train at a time: half of what is free."""
    return _SHARE_OF_MEMORY * free_bytes(device)


def free_bytes(device: torch.device) -> float:
    """The free memory of the device in bytes; infinite if the system does not report it."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        return 1024.0 * int(lines["MemAvailable"].split()[0])
    if "SC_AVPHYS_PAGES" in os.sysconf_names:
        return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return math.inf


def _tokens_per_second(base: Base, tokens: int) -> float:
    """Tokens per second of a forward pass through the base model, the faster of two."""
    positions = torch.arange(tokens)
    row = Pack(
        input_ids=torch.ones(1, tokens, dtype=torch.int64),
        position_ids=positions[None],
        forest=Forest((0, tokens), (-1,)),
        loss_positions=positions[-1:],
        labels=positions[-1:],
        owners=torch.zeros(1, dtype=torch.int64),
    )
    seconds = []
    for _ in range(2):
        started = time.perf_counter()
        with torch.inference_mode():
            float(base.logits(row).sum())  # waits for the device
        seconds.append(time.perf_counter() - started)
    return tokens / min(seconds)
