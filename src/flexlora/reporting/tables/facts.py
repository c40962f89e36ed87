"""What ran: the facts of a run and its rank types."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from flexlora.journal import Event, LossKind, loss_kind
from flexlora.reporting.names import rank_text
from flexlora.reporting.tables.selection import last_start, of_type, rounds


@dataclass(frozen=True)
class RunFacts:
    """What ran, as far as the journal tells; None is what it does not contain.

    ``lost`` counts failures of clients; uploads that were ``not_needed``, because enough others
    had arrived, are none. ``real`` is a federation of real clients, ``started`` in seconds since
    1970, ``seconds`` the time since the run was started or resumed. ``notices`` say what is
    configured without effect.
    """

    version: str | None
    method: str | None
    base_model: str | None
    seed: int | None
    clients: int | None
    unseen_clients: int | None
    rounds_planned: int | None
    rounds_done: int
    modules: int | None
    hardware: Any
    versions: Mapping[str, Any]
    config: Mapping[str, Any]
    resumed: int
    lost: int
    not_needed: int
    real: bool
    finished: bool
    started: float | None
    seconds: float | None
    adapter: str | None
    notices: tuple[str, ...] = ()

    def setting(self, path: str) -> Any:
        """The plain value of the config at a dotted path, None if there is none."""
        return _setting(self.config, path)


@dataclass(frozen=True)
class RankTypeRow:
    """How many clients train at a rank type, and how many parameters each of them trains.

    ``ranks`` are the ranks in words.
    """

    name: str
    clients: int
    trainable: int | None
    ranks: str = ""


def run_facts(events: Sequence[Event]) -> RunFacts:
    """What ran. A resumed run is described by its last start."""
    starts, start = of_type(events, "start"), last_start(events)
    finish = next(iter(reversed(of_type(events, "finish"))), {})
    config = start.get("config") or {}
    losses = [loss_kind(event) for event in of_type(events, "lost")]
    not_needed = losses.count(LossKind.NOT_NEEDED)
    return RunFacts(
        version=start.get("version"),
        method=_setting(config, "method.name"),
        base_model=_setting(config, "model.name"),
        seed=_setting(config, "seed"),
        clients=_count(start.get("clients")),
        unseen_clients=_count(start.get("unseen_clients")),
        rounds_planned=_setting(config, "federation.rounds"),
        rounds_done=len(rounds(events)),
        modules=_count(start.get("modules")),
        hardware=start.get("hardware"),
        versions=start.get("versions") or {},
        config=config,
        resumed=sum(bool(s.get("resumed")) for s in starts),
        lost=len(losses) - not_needed,
        not_needed=not_needed,
        real=any(event["event"] in ("joined", "asked") for event in events),
        finished=bool(finish),
        started=starts[0].get("time") if starts else None,
        seconds=finish.get("seconds"),
        adapter=finish.get("adapter"),
        notices=(*map(str, start.get("notices") or ()), *_of_certificates(events)),
    )


def rank_type_table(events: Sequence[Event]) -> list[RankTypeRow]:
    """The rank types in use, as the run's last start names them."""
    start = last_start(events)
    trainable, ranks = start.get("trainable") or {}, start.get("ranks") or {}
    return [
        RankTypeRow(
            name,
            clients,
            trainable.get(name),
            rank_text(name, ranks.get(name) or (), start.get("config") or {}),
        )
        for name, clients in (start.get("rank_types") or {}).items()
    ]


def _of_certificates(events: Sequence[Event]) -> list[str]:
    """What the run said of its server's certificates, with the day of each sentence."""
    days = {str(event["note"]): event.get("time") for event in of_type(events, "certificate")}
    return [
        note if time is None else f"On {datetime.fromtimestamp(time, UTC):%Y-%m-%d}: {note}."
        for note, time in days.items()
    ]


def _setting(config: Mapping[str, Any], path: str) -> Any:
    """The plain value at a dotted path, None if there is none."""
    value: Any = config
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value if isinstance(value, str | int | float) else None


def _count(value: Any) -> int | None:
    """A count, or the length of a list."""
    if value is None or isinstance(value, int):
        return value
    return len(value)
