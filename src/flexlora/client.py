"""One client's turn: from a download to an upload, the same in simulation and for real."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from flexlora import wire
from flexlora.adapter import Adapter
from flexlora.data.tokens import TokenStore
from flexlora.method import Method, Upload
from flexlora.model import Base
from flexlora.seeds import rng
from flexlora.training.loop import train
from flexlora.training.optimizer import Training

FACTS = ("tokens", "steps", "loss_total", "loss_tokens", "seconds", "bytes_down")
"""What a turn tells the journal: totals, in tokens, steps, nats, seconds and bytes."""


@dataclass(frozen=True)
class Job:
    """What the server asks of one client in one round.

    ``download`` is as it travels, or the file that holds it: then the adapter is read module
    by module, and is in memory once, as the parameters in training.
    """

    client: str
    round: int
    download: bytes | Path

    @property
    def bytes_down(self) -> int:
        """What the download weighs."""
        held = self.download
        return held.stat().st_size if isinstance(held, Path) else len(held)

    def start(self) -> Adapter:
        """What the client starts from, in the numbers that it travelled in."""
        if isinstance(self.download, Path):
            return wire.open_download(self.download).adapter
        return wire.decode_download(self.download).adapter


@dataclass(frozen=True)
class Workplace:
    """What a client's machine has: the base model, tokens, its rows, and the run's terms."""

    base: Base
    store: TokenStore
    rows: Mapping[str, Sequence[int]]
    method: Method
    training: Training
    wire_dtype: torch.dtype
    seed: int


def turn(job: Job, here: Workplace) -> bytes:
    """Train on the client's own rows and return its upload as it travels.

    All randomness is that of (seed, client, round). Precision is the wire's at both ends
    and float32 in between.
    """
    # The start is read again at the end, not held in memory while training.
    trained = train(
        here.base,
        job.start(),
        here.store,
        here.rows[job.client],
        here.training,
        rng(here.seed, "client", job.client, job.round),
        job.round,
        here.method.penalty,
    )
    facts = {
        "tokens": trained.tokens,
        "steps": trained.steps,
        "loss_total": trained.loss_total,
        "loss_tokens": trained.loss_tokens,
        "seconds": trained.seconds,
        "bytes_down": job.bytes_down,
    }
    returned = here.method.returns(job.start().to(torch.float32), trained.adapter)
    upload = Upload(job.client, job.round, returned, len(here.rows[job.client]), facts)
    return wire.encode_upload(upload, here.wire_dtype)
