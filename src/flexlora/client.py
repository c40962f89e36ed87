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
from flexlora.training.loop import Learner, Trained, train_together
from flexlora.training.optimizer import Training

FACTS = ("tokens", "computed", "steps", "loss_total", "loss_tokens", "seconds", "bytes_down")
"""What a turn tells the journal: totals, in tokens, steps, nats, seconds and bytes.

``computed`` are the tokens that went through the model, those shared by examples once."""


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
    """One client's turn; see ``turns``."""
    return turns([job], here)[0]


def turns(jobs: Sequence[Job], here: Workplace) -> list[bytes]:
    """Train clients at the same time, each on its own rows; their uploads as they travel.

    All randomness is that of (seed, client, round). Precision is the wire's at both ends
    and float32 in between. Who else is trained changes a client's numbers by rounding only.
    """
    learners = [
        Learner(
            f"client {job.client!r}",
            job.start(),
            here.rows[job.client],
            rng(here.seed, "client", job.client, job.round),
            here.method.penalty,
        )
        for job in jobs
    ]
    rounds = {job.round for job in jobs}
    if not jobs:
        return []
    if len(rounds) != 1:
        raise ValueError(f"Clients train together in one round, not in {sorted(rounds)}.")
    trained = train_together(here.base, learners, here.store, here.training, rounds.pop())
    del learners
    return [_upload(job, here, done) for job, done in zip(jobs, trained, strict=True)]


def _upload(job: Job, here: Workplace, trained: Trained) -> bytes:
    """What a client sends of its training."""
    facts = {name: getattr(trained, name) for name in FACTS if name != "bytes_down"}
    facts["bytes_down"] = job.bytes_down
    # The start is read again, not held in memory while training.
    returned = here.method.returns(job.start().to(torch.float32), trained.adapter)
    upload = Upload(job.client, job.round, returned, len(here.rows[job.client]), facts)
    return wire.encode_upload(upload, here.wire_dtype)
