"""The uploads of one round against each other: which are refused, and which are scaled down."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from flexlora import wire
from flexlora.federation.client_store import file_name
from flexlora.federation.influence.bounds import FEWEST, Accepted, Medians
from flexlora.federation.influence.clip import clipped
from flexlora.federation.influence.measure import Change, Starts, measured
from flexlora.federation.prepared import PreparedRun
from flexlora.method import State, Upload
from flexlora.storage.untrusted import RefusalCode


@dataclass(frozen=True)
class Clip:
    """An upload that was scaled down: its change in medians, and the share of it that is left."""

    upload: Upload
    ratio: float
    share: float


@dataclass
class Screen:
    """The changes of a round's uploads, as they arrive, and what they are compared with.

    ``earlier`` are the changes of the last rounds; ``folder`` is where uploads that are scaled
    down are written, and ``downloads`` where downloads lie that several clients share.
    """

    prepared: PreparedRun
    number: int
    earlier: Accepted
    folder: Path
    downloads: Path
    changes: dict[str, Change] = field(default_factory=dict)

    @property
    def is_on(self) -> bool:
        """Whether the config bounds changes at all."""
        settings = self.prepared.experiment.federation
        return bool(settings.clip_factor or settings.refuse_factor)

    def measure(self, upload: Upload, state: State) -> None:
        """Measure an upload, which is validated.

        Raises:
            RefusedMessage: its products are what is left of much larger terms, or it numbers other
                components than the client was given.
        """
        if not self.is_on:
            return
        client = self.prepared.clients[upload.client]
        change = measured(upload, client, self._starts(state))
        if change.cancelling:
            raise wire.RefusedMessage(
                RefusalCode.CANCELLING,
                f"The upload of client {upload.client!r} for round {self.number}: the product of "
                f"module {change.cancelling[0]!r} is what is left of terms over ten thousand times "
                "larger.",
            )
        self.changes[upload.client] = change

    def refused(self, uploads: Mapping[str, Upload]) -> dict[str, str]:
        """The clients whose change is too large to be used, each with the reason."""
        factor = self.prepared.experiment.federation.refuse_factor
        if not factor:
            return {}
        medians, reasons = self._medians(uploads), {}
        for id in self._measured(uploads):
            change = self.changes[id]
            kinds = [k for k, m in medians.kinds.items() if m.count >= FEWEST and k in change.norms]
            ratio = max((medians.ratio(change, kind) for kind in kinds), default=0.0)
            if ratio > factor:
                reasons[id] = (
                    f"Its upload would change the model {ratio:.3g} times as much as the median "
                    f"upload; the limit is {factor:g} times (federation.refuse_factor)."
                )
        return reasons

    def clip(self, uploads: Mapping[str, Upload], state: State) -> Iterator[Clip]:
        """The uploads that change more than the config lets them, with a share of their change."""
        factor = self.prepared.experiment.federation.clip_factor
        if not factor:
            return
        medians, starts = self._medians(uploads), self._starts(state)
        for id in self._measured(uploads):
            change, client = self.changes[id], self.prepared.clients[id]
            ratio = max((medians.ratio(change, k) for k in change.bounding), default=0.0)
            if ratio > factor:
                path = self.folder / f"{file_name(id)}.safetensors"
                kept = clipped(uploads[id], client, change, medians, factor, starts, path)
                self.changes[id] = measured(kept.upload, client, starts)
                yield Clip(kept.upload, ratio, kept.share)

    def accepted(self, uploads: Sequence[Upload]) -> Accepted:
        """The changes that the next rounds are compared with."""
        return self.earlier.after(self._changes(uploads))

    def largest(self, uploads: Sequence[Upload]) -> dict[str, float]:
        """The largest norm of a change, by kind."""
        largest: dict[str, float] = {}
        for change in self._changes(uploads):
            for kind, norms in change.norms.items():
                norm = math.sqrt(math.fsum(each**2 for each in norms.values()))
                largest[kind] = max(largest.get(kind, 0.0), norm)
        return largest

    def _starts(self, state: State) -> Starts:
        return Starts(self.prepared, self.number, state, self.downloads)

    def _medians(self, uploads: Mapping[str, Upload]) -> Medians:
        return Medians.of(self._changes(uploads.values()), self.earlier)

    def _changes(self, uploads: Collection[Upload]) -> list[Change]:
        ids = {upload.client for upload in uploads}
        return [self.changes[id] for id in self._measured(ids)]

    def _measured(self, uploads: Collection[str]) -> list[str]:
        """The clients of these uploads, in the order of the population and not of arrival."""
        if not self.is_on:
            return []
        return [id for id in self.prepared.clients if id in uploads]
