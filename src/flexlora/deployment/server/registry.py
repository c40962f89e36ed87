"""The real clients of a run: who came, with what means, and which rank each was given."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from flexlora.config import PAPER_TYPES, Ranks, RankType, rank_table, several
from flexlora.errors import ProtocolError
from flexlora.federation import Population
from flexlora.method import Client
from flexlora.storage.files import write_atomically

FILE = "clients.json"
ARRIVALS = "arrivals.log"
"""Who came and who was not let in, in words: also before the first round, and so the journal."""
NODES = "nodes.json"
"""Flower's number of every node that was let in, by its name."""
MOST_EXAMPLES = 10**9
_LONGEST_NAME = 100
_FASTEST = 1e12


@dataclass(frozen=True)
class ClientInfo:
    """One client: its Flower ``node``, what it gives, and what it said of its speed."""

    node: int
    attention: int
    feed_forward: int
    examples: int
    device: str
    tokens_per_second: float | None

    @property
    def rank_type(self) -> str:
        """The name of its ranks in reports."""
        if self.attention == self.feed_forward:
            return f"r{self.attention}"
        return f"r{self.attention}-{self.feed_forward}"


@dataclass(frozen=True)
class RankLimits:
    """How large a rank each client may take at most, by the config's section ``ranks``.

    Clients that the section names have the limit of their type, others ``rank``; None: they
    are not let in.
    """

    rank: RankType | None
    named: Mapping[str, RankType]

    @classmethod
    def of(cls, settings: Ranks) -> RankLimits:
        """The limits that a config's section says.

        Raises:
            ProtocolError: it deals ranks out by shares, which needs a population known beforehand.
        """
        if settings.table is not None:
            settings = rank_table(Path(settings.table), settings.clients)
        if settings.distribution is not None:
            raise ProtocolError(
                "ranks.distribution deals ranks to clients known beforehand. For real clients give "
                "ranks.rank, the most that any may take, or name them in ranks.clients."
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
        return cls(rank, {id: types[kind] for id, kind in settings.clients.items()})

    @property
    def every(self) -> list[RankType]:
        """The limits of all clients."""
        return [*self.named.values(), *([] if self.rank is None else [self.rank])]

    @property
    def several(self) -> bool:
        """Whether not all clients that train a module have the same limit there."""
        return several(self.every)

    @property
    def whole(self) -> bool:
        """Whether all clients may train the same modules."""
        return len({limit.targets for limit in self.every}) == 1

    def largest(self) -> RankType:
        """The largest of all."""
        return RankType(
            max(limit.attention for limit in self.every),
            max(limit.feed_forward for limit in self.every),
        )

    def __call__(self, client: str) -> RankType:
        """The limit of a client. Raises ProtocolError if it is not let in."""
        found = self.named.get(client, self.rank)
        if found is None:
            raise ProtocolError(
                f"Client {client!r} is none of those named in ranks.clients, and there is no "
                "ranks.rank for others."
            )
        return found


@dataclass
class ClientRegistry(Population):
    """The clients that came so far, by name; kept in the run's folder.

    With ``bound`` a client's name belongs to the node whose key was let in under it; else the
    last that says to be it is taken for it. With ``alike`` all must have the
    ranks of the limit, and with ``whole`` all must train all modules that it names. None weighs
    more than ``most_examples``.
    """

    folder: Path
    limit: RankLimits
    modules: Sequence[str]
    bound: bool = True
    alike: bool = False
    whole: bool = False
    most_examples: int | None = None
    entries: dict[str, ClientInfo] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.folder / FILE).exists():
            held = json.loads((self.folder / FILE).read_text(encoding="utf-8"))
            self.entries = {id: ClientInfo(**entry) for id, entry in held.items()}

    def admit(self, said: Mapping[str, Any], node: int) -> tuple[str, ClientInfo]:
        """Write a client down, with a rank within its own means and the server's limit.

        Raises:
            ProtocolError: what it says is ill-formed, or it is not let in.
        """
        id = said.get("client")
        if not isinstance(id, str) or not 0 < len(id) <= _LONGEST_NAME:
            raise ProtocolError(f"A client calls itself {str(id)[:50]!r}, which is no name.")
        if self.bound and self._keyed().get(id) != node:
            raise ProtocolError(
                f"A node calls itself {str(id)!r}, but its key was let in under another name."
            )
        limit = self.limit(id)
        speed = said.get("tokens_per_second")
        # Whole numbers in JSON have any length, and NaN passes for a number.
        usable = isinstance(speed, int | float) and 0 <= speed <= _FASTEST
        entry = ClientInfo(
            node=node,
            attention=min(limit.attention, _count(said, "attention", id, least=0)),
            feed_forward=min(limit.feed_forward, _count(said, "feed_forward", id, least=0)),
            examples=_count(said, "examples", id),
            device=str(said.get("device"))[:40],
            tokens_per_second=float(speed) if speed is not None and usable else None,
        )
        pairs = [(entry.attention, limit.attention), (entry.feed_forward, limit.feed_forward)]
        if not any(rank for rank, _ in pairs):
            raise ProtocolError(f"Client {id!r} trains nothing that its limit ({limit}) leaves it.")
        if not self._ranks(entry):
            raise ProtocolError(
                f"Client {id!r} would train at {entry.rank_type}, but none of the adapted modules "
                f"is of that kind: {list(self.modules)[:3]} and so on; join with other --modules."
            )
        if self.whole and any(most and not rank for rank, most in pairs):
            raise ProtocolError(
                f"Client {id!r} would train at {entry.rank_type}, but this method decides over all "
                f"modules at once, and everybody trains them ({limit}); join with --modules all."
            )
        if self.alike and any(rank not in (0, most) for rank, most in pairs):
            raise ProtocolError(
                f"Client {id!r} would train at {entry.rank_type}, but this method needs one rank "
                f"for all, that of the server ({limit}); join with it, or not at all."
            )
        self.entries = dict(sorted({**self.entries, id: entry}.items()))
        held = {name: asdict(each) for name, each in self.entries.items()}
        write_atomically(self.folder / FILE, json.dumps(held, indent=1).encode())
        return id, entry

    def capped(self, id: str) -> str | None:
        """What is to be said of a client that says it has more examples than it may weigh."""
        says, most = self.entries[id].examples, self.most_examples
        if most is None or says <= most:
            return None
        return (
            f"Client {id!r} says that it has {says} examples; its uploads weigh as much as {most}, "
            "which is federation.most_examples."
        )

    def note(self, line: str) -> None:
        """Say who came, or was not let in, to whoever looks on."""
        with (self.folder / ARRIVALS).open("a", encoding="utf-8") as file:
            # What nodes say of themselves is no line of its own.
            file.write(" ".join(line.split())[:500] + "\n")

    def _keyed(self) -> dict[str, int]:
        """The nodes that were let in, by name; read anew, as more may have been."""
        file = self.folder / NODES
        found: dict[str, int] = (
            json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        )
        return found

    def __getitem__(self, id: str) -> Client:
        entry = self.entries[id]
        return Client(id, self._ranks(entry), entry.rank_type, entry.examples)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def kinds(self) -> Mapping[str, Mapping[str, int]]:
        """The ranks of every type that a client has now."""
        order = sorted(self.entries.values(), key=lambda e: (e.attention, e.feed_forward))
        return {entry.rank_type: self._ranks(entry) for entry in order}

    @property
    def counts(self) -> Mapping[str, int]:
        """How many clients are of each type now."""
        found = Counter(entry.rank_type for entry in self.entries.values())
        return {kind: found[kind] for kind in self.kinds}

    def _ranks(self, entry: ClientInfo) -> dict[str, int]:
        return RankType(entry.attention, entry.feed_forward).by_module(self.modules)


def _count(said: Mapping[str, Any], name: str, client: str, least: int = 1) -> int:
    value = said.get(name)
    if type(value) is not int or not least <= value <= MOST_EXAMPLES:
        raise ProtocolError(f"Client {client!r} says its {name} are {str(value)[:30]!r}.")
    return value
