"""A simulation some of whose clients are malicious: a wrapper around the transport."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from flexlora import wire
from flexlora.federation.attacks.attack import Attack, Malicious
from flexlora.federation.client_turn import ClientRuntime, TurnRequest
from flexlora.federation.simulated import SimulatedTransport
from flexlora.federation.transport import Received, Reply, Transport, WaitPolicy
from flexlora.lowrank import Adapter
from flexlora.method import Feature, RoundContext, Space, Upload


@dataclass(frozen=True)
class AttackedTransport:
    """Honest clients behind ``inner``; malicious ones train by themselves in ``runtime``.

    A malicious client sees its own download and rows, and what the other malicious ones see. The
    server sees bytes as of any client, and no method knows of it. ``ranks`` are the largest of
    any client, by module.
    """

    inner: Transport
    runtime: ClientRuntime
    attackers: frozenset[str]
    attack: Attack
    space: Space
    clip_factor: float
    rounds: int
    ranks: Mapping[str, int]

    @property
    def clients_at_once(self) -> int:
        """How many honest clients train at a time."""
        return self.inner.clients_at_once

    def present(self, clients: Collection[str]) -> list[str]:
        """Those that can be reached."""
        return self.inner.present(clients)

    def exchange(self, jobs: Iterable[TurnRequest], patience: WaitPolicy) -> Iterator[Received]:
        """The honest clients' replies, then the malicious ones'."""
        own: list[TurnRequest] = []

        def honest() -> Iterator[TurnRequest]:
            for job in jobs:
                if job.client in self.attackers:
                    own.append(job)
                else:
                    yield job

        yield from self.inner.exchange(honest(), patience)
        if own:
            yield from self._attacking(own, patience)

    def _attacking(
        self, requests: Sequence[TurnRequest], patience: WaitPolicy
    ) -> Iterator[Received]:
        """Train the malicious clients, and send what they make of it."""
        if not self.attack.is_due(requests[0].round, self.rounds):
            yield from self.inner.exchange(requests, patience)
            return
        with TemporaryDirectory(prefix="flexlora-") as folder:
            uploads: list[Upload] = []
            trained: list[TurnRequest] = []
            by_client = {request.client: request for request in requests}
            # Together or not at all: they may look at each other's changes.
            for reply in SimulatedTransport(self.runtime).exchange(requests, WaitPolicy()):
                if not isinstance(reply, Reply):
                    yield reply
                    continue
                path = Path(folder) / f"{len(uploads)}.safetensors"
                path.write_bytes(reply.data)
                uploads.append(wire.open_upload(path))
                trained.append(by_client[reply.client])
            seen = [
                self._seen(request, upload)
                for request, upload in zip(trained, uploads, strict=True)
            ]
            changes = self.attack.changes(seen)
            for one, upload, change in zip(seen, uploads, changes, strict=True):
                yield Reply(one.client, self._encoded(replace(upload, adapter=one.sending(change))))

    def _seen(self, request: TurnRequest, upload: Upload) -> Malicious:
        runtime = self.runtime
        shapes = {module: runtime.base.shapes[module] for module in self.ranks}
        context = RoundContext(request.round, runtime.seed, shapes, self.ranks)
        return Malicious(
            request.client,
            request.round,
            runtime.method.untrained(request.opened(), context),
            Adapter(dict(upload.adapter)),
            self.space,
            self.clip_factor,
            runtime.seed,
        )

    def _encoded(self, upload: Upload) -> bytes:
        sparse = Feature.SPARSE_MESSAGES in self.runtime.method.features
        return wire.encode_upload(upload, self.runtime.wire_dtype, sparse)
