"""Updates that clients merge into their base weights for good."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from flexlora.lowrank import Adapter


@dataclass(frozen=True)
class MergeLog:
    """Each round's update, and how far every client has merged them.

    ``updates`` is by the round that made the update. ``merged_until`` is, by client, the last
    round whose update it has merged, as its uploads have shown.
    """

    updates: Mapping[int, Adapter] = field(default_factory=dict)
    merged_until: Mapping[str, int] = field(default_factory=dict)

    def pending(self, client: str) -> dict[int, Adapter]:
        """The updates that ``client`` has not merged yet."""
        last = self.merged_until.get(client, 0)
        return {round: update for round, update in self.updates.items() if round > last}

    def merged(self, client: str) -> list[int]:
        """The rounds whose updates ``client`` has merged."""
        last = self.merged_until.get(client, 0)
        return [round for round in self.updates if round <= last]

    def forget(self, client: str) -> MergeLog:
        """The log in which ``client`` has merged nothing: it has lost its base."""
        left = {id: last for id, last in self.merged_until.items() if id != client}
        return MergeLog(self.updates, left)

    def after(self, round: int, clients: Iterable[str], update: Adapter | None = None) -> MergeLog:
        """The log after a round in which these clients sent uploads, and that made an update.

        A client that sent an upload had merged all updates before this round.
        """
        updates = self.updates if update is None else {**self.updates, round: update}
        return MergeLog(updates, {**self.merged_until, **dict.fromkeys(clients, round - 1)})

    def only(self, modules: Collection[str]) -> MergeLog:
        """What the log holds of these modules."""
        updates = {round: update.only(modules) for round, update in self.updates.items()}
        return MergeLog(updates, self.merged_until)
