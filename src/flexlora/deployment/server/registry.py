"""The real clients of a run: which have connected, what they offer, and their ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from flexlora.config import RankType, rank_text
from flexlora.deployment.server import run_files
from flexlora.deployment.server.limits import RankLimits
from flexlora.errors import ProtocolError
from flexlora.federation import Population
from flexlora.method import Client
from flexlora.storage import read_sealed, write_sealed
from flexlora.storage.untrusted import one_line

FILE = "clients.json"
MOST_EXAMPLES = 10**9
_LONGEST_NAME = 100
_LONGEST_DEVICE = 40
_FASTEST = 1e12


@dataclass(frozen=True)
class ClientInfo:
    """One client: Flower's number of its ``node``, its ranks, and what it reported of itself.

    ``examples`` are those that it trains on, ``holdout`` those that it evaluates on.
    """

    node: int
    attention: int
    feed_forward: int
    examples: int
    device: str
    tokens_per_second: float | None
    holdout: int = 0

    @property
    def rank_type(self) -> str:
        """The name of its ranks in the journal."""
        if self.attention == self.feed_forward:
            return f"r{self.attention}"
        return f"r{self.attention}-{self.feed_forward}"

    @property
    def rank_text(self) -> str:
        """Its ranks in words."""
        return rank_text(self.attention, self.feed_forward)


@dataclass
class ClientRegistry(Population):
    """The clients that have connected so far, by name; stored in the run's folder.

    With ``bound`` a client's name belongs to the node whose key was registered under it; else the
    last node that reports a name is taken for that client. ``one_rank`` requires all clients to
    have the limit's ranks, ``all_modules`` to train every module that the limit names. No client
    weighs more than ``most_examples``.
    """

    folder: Path
    limits: RankLimits
    modules: Sequence[str]
    bound: bool = True
    one_rank: bool = False
    all_modules: bool = False
    most_examples: int | None = None
    entries: dict[str, ClientInfo] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.folder / FILE).exists():
            remedy = "restore it from a copy, or remove it: clients that join again are recorded"
            stored = read_sealed(self.folder / FILE, remedy)["clients"]
            self.entries = {id: ClientInfo(**entry) for id, entry in stored.items()}

    def admit(self, report: Mapping[str, Any], node: int) -> tuple[str, ClientInfo]:
        """Record a client, with ranks within its own limits and the server's.

        Raises:
            ProtocolError: the report is ill-formed, or the client is rejected.
        """
        id = self._name(report, node)
        limit = self.limits.for_client(id)
        entry = _info(report, node, id, limit)
        self._check(id, entry, limit)
        self.entries = dict(sorted({**self.entries, id: entry}.items()))
        stored = {name: asdict(each) for name, each in self.entries.items()}
        write_sealed(self.folder / FILE, {"clients": stored})
        return id, entry

    def _name(self, report: Mapping[str, Any], node: int) -> str:
        id = report.get("client")
        if not isinstance(id, str) or not id or one_line(id, _LONGEST_NAME) != id:
            raise ProtocolError(
                f"Invalid client name {one_line(id, 50)!r}; a name has 1 to {_LONGEST_NAME} "
                "characters, all printable."
            )
        if self.bound and self._registered().get(id) != node:
            raise ProtocolError(
                f"The client gives the name {id!r}, but its key is registered under another name; "
                f"join without --name, or with the name of the key."
            )
        return id

    def _check(self, id: str, entry: ClientInfo, limit: RankType) -> None:
        """Reject ranks with which the client, or the method, cannot train."""
        pairs = [(entry.attention, limit.attention), (entry.feed_forward, limit.feed_forward)]
        ranks = f"Client {id!r} would train with {entry.rank_text}"
        if not any(rank for rank, _ in pairs):
            raise ProtocolError(
                f"Client {id!r} would train nothing: its own limits and the server's ({limit}) "
                "have no module in common; join with other --modules."
            )
        if not self._ranks(entry):
            raise ProtocolError(
                f"{ranks}, but none of the adapted modules is of that type: "
                f"{list(self.modules)[:3]} and so on; join with other --modules."
            )
        if self.all_modules and any(most and not rank for rank, most in pairs):
            raise ProtocolError(
                f"{ranks}, but this method requires every client to train all modules ({limit}); "
                "join with --modules all."
            )
        if self.one_rank and any(rank not in (0, most) for rank, most in pairs):
            raise ProtocolError(
                f"{ranks}, but this method requires one rank for all clients, the server's "
                f"({limit}); join with --rank {max(limit.attention, limit.feed_forward)}."
            )

    def capped(self, id: str) -> str | None:
        """A sentence if a client reports more examples than it may weigh; else None."""
        reported, most = self.entries[id].examples, self.most_examples
        if most is None or reported <= most:
            return None
        return (
            f"Client {id!r} reports {reported} examples; its uploads are weighted as {most}, "
            "the limit federation.most_examples."
        )

    def note(self, line: str) -> None:
        """Append a sentence for the server's console."""
        run_files.note(self.folder, line)

    def is_authorised(self, id: str) -> bool:
        """Whether a client may take part now; without keys every client may."""
        return not self.bound or id in self._registered()

    def name_of(self, node: int) -> str | None:
        """The name under which a node's key is registered; None without keys."""
        names = (name for name, number in self._registered().items() if number == node)
        return next(names, None)

    def _registered(self) -> dict[str, int]:
        """The authorised nodes by name, read again each time, as there may be new ones."""
        return run_files.numbers(self.folder, run_files.NODES)

    def __getitem__(self, id: str) -> Client:
        entry = self.entries[id]
        return Client(id, self._ranks(entry), entry.rank_type, entry.examples)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def kinds(self) -> Mapping[str, Mapping[str, int]]:
        """The ranks by module of every rank type that a client has now."""
        order = sorted(self.entries.values(), key=lambda e: (e.attention, e.feed_forward))
        return {entry.rank_type: self._ranks(entry) for entry in order}

    @property
    def counts(self) -> Mapping[str, int]:
        """The number of clients of each rank type now."""
        counts = Counter(entry.rank_type for entry in self.entries.values())
        return {rank_type: counts[rank_type] for rank_type in self.kinds}

    def _ranks(self, entry: ClientInfo) -> dict[str, int]:
        return RankType(entry.attention, entry.feed_forward).by_module(self.modules)


def _info(report: Mapping[str, Any], node: int, client: str, limit: RankType) -> ClientInfo:
    """What a client reports of itself, checked, with ranks within the limit."""
    speed: Any = report.get("tokens_per_second")
    # Whole numbers in JSON have any length, and NaN passes for a number.
    usable = type(speed) in (int, float) and 0 <= speed <= _FASTEST
    return ClientInfo(
        node=node,
        attention=min(limit.attention, _count(report, "attention", client, least=0)),
        feed_forward=min(limit.feed_forward, _count(report, "feed_forward", client, least=0)),
        examples=_count(report, "examples", client),
        device=one_line(report.get("device"), _LONGEST_DEVICE),
        tokens_per_second=float(speed) if usable else None,
        holdout=_count(report, "holdout", client, least=0) if "holdout" in report else 0,
    )


_LABELS = {
    "attention": "attention rank",
    "feed_forward": "feed-forward rank",
    "holdout": "number of held-out examples",
}


def _count(report: Mapping[str, Any], name: str, client: str, least: int = 1) -> int:
    value = report.get(name)
    if type(value) is not int or not least <= value <= MOST_EXAMPLES:
        label = _LABELS.get(name, f"number of {name}")
        raise ProtocolError(f"Client {client!r} sent an invalid {label}: {one_line(value, 30)!r}.")
    return value
