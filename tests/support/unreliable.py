"""Clients that come and go: uploads made up from downloads, and a network that spoils them."""

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

import torch

from flexlora import wire
from flexlora.federation.client_turn import METRICS, TurnRequest
from flexlora.federation.prepared import PreparedRun
from flexlora.federation.transport import LateReply, Lost, Received, Reply, WaitPolicy
from flexlora.journal.events import LossKind
from flexlora.lowrank.factors import Adapter, Factors
from flexlora.method import Upload

FATES = ("answers", "loses", "falls silent", "answers twice", "sends two", "sends garbage")
"""What becomes of a request; the first is the only one of a reliable network."""


def upload(prepared: PreparedRun, request: TurnRequest, version: int = 0) -> Upload:
    """What a client might send: its download, moved by a step that its name and round determine."""
    seed = random.Random(f"{request.client} {request.round} {version}").getrandbits(32)
    draw = torch.Generator().manual_seed(seed)

    def moved(factors: Factors) -> Factors:
        step = torch.randn(factors.B.shape, generator=draw)
        return Factors(factors.B.float() + 0.1 * step, factors.A.float())

    start = request.opened().adapter
    return Upload(
        request.client,
        request.round,
        Adapter({module: moved(factors) for module, factors in start.items()}),
        prepared.clients[request.client].examples,
        {**dict.fromkeys(METRICS, 1), "bytes_down": request.bytes_down},
    )


def data(prepared: PreparedRun, sent: Upload) -> bytes:
    return wire.encode_upload(sent, prepared.wire_dtype)


@dataclass
class Unreliable:
    """A transport whose clients drop out, answer twice, late, for others or nonsense, in any order.

    ``dropout`` is the share of requests whose answer does not come, or not as it should.
    ``received`` has, by round and client, the first good upload that the server took.
    """

    prepared: PreparedRun
    draw: random.Random
    dropout: float
    received: dict[int, dict[str, Upload]] = field(default_factory=dict)
    earlier: list[Reply] = field(default_factory=list)
    clients_at_once: int = 1

    def present(self, clients: Iterable[str]) -> list[str]:
        """Now and then a client cannot be reached."""
        return [id for id in clients if self.draw.random() >= self.dropout / 4]

    def exchange(self, jobs: Iterable[TurnRequest], patience: WaitPolicy) -> Iterator[Received]:
        asked, answers = set(), []
        for job in jobs:
            asked.add(job.client)
            answers.append(self._answers(job))
        # Whose first answer comes first, and where between them the second ones.
        order = [place for place, several in enumerate(answers) for _ in several]
        self.draw.shuffle(order)
        if self.earlier and self.draw.random() < 0.3:
            stale = self.draw.choice(self.earlier)
            asked.discard(stale.client)  # its request has an answer, though no good one
            yield stale
        for place in order:
            if patience.enough():
                return
            reply, sent = answers[place].pop(0)
            if sent is not None and sent.client in asked:
                self.received.setdefault(sent.round, {}).setdefault(sent.client, sent)
                self.earlier.append(reply)
            asked.discard(reply.client)
            yield reply
            if self.draw.random() < 0.1:
                yield LateReply(reply.client, "It answers an earlier request.")

    def _answers(self, job: TurnRequest) -> list[tuple[Reply | Lost, Upload | None]]:
        """What comes back to a request, each with the upload in it if it is a good one."""
        bad = self.draw.random() < self.dropout
        fate = self.draw.choice(FATES[1:]) if bad else FATES[0]
        sent = upload(self.prepared, job)
        good = (Reply(job.client, data(self.prepared, sent)), sent)
        other = replace(
            sent, client=self.draw.choice([*self.prepared.clients]), round=job.round + 1
        )
        answers = {
            "answers": [good],
            "loses": [(Lost(job.client, "unplugged", LossKind.UNREACHABLE), None)],
            "falls silent": [],
            "answers twice": [good, good],
            "sends two": [good, self._other(job)],
            "sends garbage": [(Reply(job.client, data(self.prepared, other)), None), good],
        }
        return answers[fate]

    def _other(self, job: TurnRequest) -> tuple[Reply, Upload]:
        """A good upload of other numbers, which comes too late to count."""
        sent = upload(self.prepared, job, version=1)
        return Reply(job.client, data(self.prepared, sent)), sent
