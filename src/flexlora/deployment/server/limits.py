"""The largest rank of each real client, by the section ``ranks`` of the config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from flexlora.config import PAPER_TYPES, Ranks, RankType, rank_table, several
from flexlora.errors import ProtocolError


@dataclass(frozen=True)
class RankLimits:
    """The largest rank of each client.

    Clients in ``by_client`` have their own limit, others ``rank``; None rejects all others.
    """

    rank: RankType | None
    by_client: Mapping[str, RankType]

    @classmethod
    def of(cls, settings: Ranks) -> RankLimits:
        """The limits in a config's section.

        Raises:
            ProtocolError: it assigns ranks by shares, which needs a fixed set of clients.
        """
        if settings.table is not None:
            settings = rank_table(Path(settings.table), settings.clients)
        if settings.distribution is not None:
            raise ProtocolError(
                "ranks.distribution assigns ranks to a fixed set of simulated clients. For real "
                "clients set ranks.rank, the largest rank that any of them may use, or list them "
                "in ranks.clients."
            )
        types = {
            name: RankType(t.attention, t.feed_forward)
            for name, t in (settings.types or {}).items()
        }
        types = types or dict(PAPER_TYPES)
        unknown = sorted(set(settings.clients.values()) - types.keys())
        if unknown:
            raise ProtocolError(
                f"ranks.clients names the types {unknown}; there are {list(types)}."
            )
        rank = None if settings.rank is None else RankType(settings.rank, settings.rank)
        return cls(rank, {id: types[name] for id, name in settings.clients.items()})

    @property
    def every(self) -> list[RankType]:
        """The limits of all clients, in ``by_client`` and for the others."""
        return [*self.by_client.values(), *([] if self.rank is None else [self.rank])]

    @property
    def mixed(self) -> bool:
        """Whether two clients that train the same module may have different limits there."""
        return several(self.every)

    @property
    def same_modules(self) -> bool:
        """Whether all clients may train the same modules."""
        return len({limit.targets for limit in self.every}) == 1

    def largest(self) -> RankType:
        """The largest limit, for attention and for feed-forward modules."""
        return RankType(
            max(limit.attention for limit in self.every),
            max(limit.feed_forward for limit in self.every),
        )

    def for_client(self, client: str) -> RankType:
        """The limit of a client.

        Raises:
            ProtocolError: the client may not take part.
        """
        limit = self.by_client.get(client, self.rank)
        if limit is None:
            raise ProtocolError(
                f"Client {client!r} is not in ranks.clients, and there is no ranks.rank for "
                "clients that are not listed there."
            )
        return limit
