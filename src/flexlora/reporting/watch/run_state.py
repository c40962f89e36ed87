"""How a run stands: its events folded, one by one, into what a status page says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

from flexlora.journal import Event, mean_scores

State = Literal["idle", "training", "answered", "lost"]

LOSSES = {
    "It did not answer": "late",
    "Its turn was not over": "late",
    "Its turn had not begun": "late",
    "It was not needed any more": "not_needed",
    "Its node is not online": "unreachable",
    "Flower did not take the message": "unreachable",
    "Flower's error": "unreachable",
}
"""The kinds of losses by how their reasons begin; all others are ``FAILED``."""

FAILED = "failed"
"""A turn that went wrong, or an upload that was of no use."""


@dataclass
class ClientState:
    """What the journal says of one client.

    ``seen`` is when it last gave a sign of life, ``since`` when it was handed its job, both in
    seconds since 1970; None where the journal keeps no times. Bytes are since the start.
    """

    name: str
    rank_type: str = ""
    ranks: tuple[int, ...] = ()
    examples: int | None = None
    device: str = ""
    tokens_per_second: float | None = None
    bytes_up: int = 0
    bytes_down: int = 0
    turns: int = 0
    lost: int = 0
    reason: str = ""
    since: float | None = None
    seen: float | None = None


@dataclass(frozen=True)
class Scores:
    """The latest evaluation of an adapter on one group of clients, ``seen`` or ``unseen``."""

    adapter: str
    group: str
    round: int
    examples: int
    rouge_l: float
    exact_match: float
    loss: float


@dataclass
class RunState:
    """The state of a run after the events that were added; one event costs no more than itself."""

    start: Event = field(default_factory=dict)
    last_round: Event = field(default_factory=dict)
    finish: Event | None = None
    short: Event | None = None
    stopped: Event | None = None
    asking: int = 0
    rounds: int = 0
    last_time: float | None = None
    totals: Counter[str] = field(default_factory=Counter)
    losses: Counter[str] = field(default_factory=Counter)
    scores: dict[tuple[str, str], Scores] = field(default_factory=dict)
    clients: dict[str, ClientState] = field(default_factory=dict)
    busy: dict[State, set[str]] = field(
        default_factory=lambda: {"training": set(), "answered": set(), "lost": set()}
    )

    def add(self, event: Event) -> None:
        """Take note of the next event; kinds that are not known are passed over."""
        self.last_time = event.get("time", self.last_time)
        match event["event"]:
            case "start":
                self._started(event)
            case "joined":
                self._joined(event)
            case "asked" | "client" | "lost" | "stray":
                self._turn(event)
            case "short":
                self.short = event
            case "round":
                self._round(event)
            case "evaluation":
                self._evaluated(event)
            case "refused":
                self.totals["refused"] += 1
            case "finish":
                self.finish = event
            case "stopped":
                self.stopped = event

    @property
    def state(self) -> Literal["waiting", "running", "short", "stopped", "finished"]:
        """What the run is at; ``waiting`` is before it began, ``stopped`` by a fault."""
        if self.finish:
            return "finished"
        if self.stopped:
            return "stopped"
        if not self.start:
            return "waiting"
        return "short" if self.short else "running"

    @property
    def planned(self) -> int:
        """How many rounds the config asks for; 0 where it is not known."""
        return int(self._federation().get("rounds") or 0)

    @property
    def wanted(self) -> int:
        """How many uploads a round wants; 0 where it is not known."""
        clients = int(self.start.get("clients") or 0)
        how = self._federation()
        if how.get("cohort"):
            return min(int(how["cohort"]), clients)
        return max(int((how.get("fraction") or 0) * clients + 1e-9), 1) if clients else 0

    @property
    def round(self) -> int:
        """The round that goes on, or the last one; 0 before the first."""
        if self.finish or (self.planned and self.rounds >= self.planned):
            return self.rounds
        return self.rounds + 1 if self.start else 0

    @property
    def loss(self) -> float | None:
        """The mean training loss of the last round, in nats a token."""
        tokens = self.last_round.get("loss_tokens")
        return float(self.last_round["loss_total"] / tokens) if tokens else None

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens of the last round by the seconds of the whole round."""
        seconds = self.last_round.get("seconds")
        return float(self.last_round["tokens"] / seconds) if seconds else None

    @property
    def by_state(self) -> dict[State, int]:
        """How many of the clients heard of are in each state."""
        busy = {state: len(names) for state, names in self.busy.items()}
        return {"idle": len(self.clients) - sum(busy.values()), **busy}

    def state_of(self, name: str) -> State:
        """What a client is at; ``lost`` stays until it is asked again or comes back."""
        return next((state for state, names in self.busy.items() if name in names), "idle")

    def latest(self, most: int) -> Iterator[ClientState]:
        """The clients last heard of first, at most so many."""
        return islice(reversed(self.clients.values()), most)

    def _federation(self) -> dict[str, Any]:
        found = (self.start.get("config") or {}).get("federation")
        return found if isinstance(found, dict) else {}

    def _started(self, event: Event) -> None:
        # A run that goes on asks its round anew.
        self.start, self.finish, self.short, self.stopped = event, None, None, None
        self._idle()

    def _joined(self, event: Event) -> None:
        client = self._heard(event)
        client.rank_type = event.get("rank_type", "")
        client.ranks = tuple(event.get("ranks", ()))
        client.examples = event.get("examples")
        client.device = event.get("device") or ""
        client.tokens_per_second = client.tokens_per_second or event.get("tokens_per_second")
        self.busy["lost"].discard(client.name)

    def _turn(self, event: Event) -> None:
        if event["round"] > self.asking:
            self.asking, self.short = event["round"], None
            self._idle()
        client = self._heard(event)
        match event["event"]:
            case "asked":
                client.since = event.get("time")
                self._becomes("training", client)
            case "client":
                self._answered(client, event)
            case "lost":
                client.lost, client.reason = client.lost + 1, event["reason"]
                self.losses[kind_of_loss(event["reason"])] += 1
                self._becomes("lost", client)
            case "stray":
                self.totals["strays"] += 1

    def _answered(self, client: ClientState, event: Event) -> None:
        client.rank_type = event["rank_type"]
        # The ranks that joining clients say are their own; others are those of their type.
        types = self.start.get("ranks") or {}
        client.ranks = client.ranks or tuple(types.get(client.rank_type, ()))
        client.examples = event["examples"]
        client.turns += 1
        client.bytes_up += event["bytes_up"]
        client.bytes_down += event["bytes_down"]
        if event["seconds"]:
            client.tokens_per_second = event["tokens"] / event["seconds"]
        for key in ("tokens", "bytes_up", "bytes_down"):
            self.totals[key] += event[key]
        self.totals["uploads"] += 1
        self._becomes("answered", client)
        if self.short and len(self.busy["answered"]) >= self.short["quorum"]:
            self.short = None

    def _round(self, event: Event) -> None:
        self.rounds, self.asking = event["round"], max(self.asking, event["round"])
        self.last_round, self.short = event, None
        self.totals["rounds"] += 1
        self._idle()

    def _evaluated(self, event: Event) -> None:
        for group, seen in (("seen", True), ("unseen", False)):
            rows = [row for row in event["clients"] if row["seen"] is seen]
            if rows:
                found: dict[str, Any] = {**mean_scores(rows)}
                scores = Scores(event["adapter"], group, event["round"], **found)
                self.scores[event["adapter"], group] = scores

    def _heard(self, event: Event) -> ClientState:
        """The client of an event, now the last of all to be heard of."""
        name = event["client"]
        client = self.clients.pop(name, None) or ClientState(name)
        self.clients[name] = client
        if event["event"] in ("joined", "client", "stray"):
            client.seen = event.get("time", client.seen)
        return client

    def _becomes(self, state: State, client: ClientState) -> None:
        for names in self.busy.values():
            names.discard(client.name)
        self.busy[state].add(client.name)

    def _idle(self) -> None:
        self.busy["training"].clear()
        self.busy["answered"].clear()


def kind_of_loss(reason: str) -> str:
    """What kind of loss a reason tells of."""
    return next((kind for said, kind in LOSSES.items() if reason.startswith(said)), FAILED)
