"""The state of a run: its events folded, one by one, into what a status page shows."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

from flexlora.journal import Event, LossKind, counted, loss_kind, mean_scores
from flexlora.reporting.names import shortened

State = Literal["idle", "training", "answered", "lost"]


@dataclass
class ClientState:
    """What the journal says about one client.

    ``seen`` is the time of its last message, ``since`` when it was sent its request, both in
    seconds since 1970; None if the journal has no times. Bytes are since the start. ``turns``
    counts its usable uploads, ``lost`` the rounds in which it failed to return one. ``reason`` is
    that of its last loss, ``loss_kind`` the kind if its last round ended with a loss.
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
    loss_kind: LossKind | None = None
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


@dataclass(frozen=True)
class LogEntry:
    """Something that happened, in words, with its time in seconds since 1970 if it is known.

    ``bad`` entries are failures.
    """

    time: float | None
    round: int | None
    text: str
    bad: bool = False


LOGGED = 100
"""The number of log entries that are kept, the latest."""


@dataclass
class RunState:
    """The state of a run after the events that were added; adding costs time for that event only.

    ``current`` is the latest round that any client took part in, ``rounds`` the last completed one.
    ``losses_by_round`` are the mean training losses, ``curves`` the losses of the global adapter by
    round (0: of the base model), by group of clients, ``own`` being all on their own rows; all in
    nats per token.
    """

    start: Event = field(default_factory=dict)
    last_round: Event = field(default_factory=dict)
    finish: Event | None = None
    short: Event | None = None
    stopped: Event | None = None
    current: int = 0
    rounds: int = 0
    last_time: float | None = None
    totals: Counter[str] = field(default_factory=Counter)
    losses: Counter[LossKind] = field(default_factory=Counter)
    scores: dict[tuple[str, str], Scores] = field(default_factory=dict)
    clients: dict[str, ClientState] = field(default_factory=dict)
    losses_by_round: dict[int, float] = field(default_factory=dict)
    curves: dict[str, dict[int, float]] = field(default_factory=dict)
    log: deque[LogEntry] = field(default_factory=lambda: deque(maxlen=LOGGED))
    busy: dict[State, set[str]] = field(
        default_factory=lambda: {"training": set(), "answered": set(), "lost": set()}
    )

    def add(self, event: Event) -> None:
        """Account for the next event; types of later versions are ignored."""
        self.last_time = event.get("time", self.last_time)
        self._log(event)
        match event["event"]:
            case "start":
                self._started(event)
            case "joined":
                self._joined(event)
            case "asked" | "client" | "lost" | "stray":
                self._client_event(event)
            case "short":
                self.short = event
            case "round":
                self._round(event)
            case "evaluation":
                self._evaluated(event)
            case "client_evaluation" if event["loss"] is not None:
                self.curves.setdefault("own", {})[event["round"]] = event["loss"]
            case "refused":
                self.totals["refused"] += 1
            case "finish":
                self.finish = event
                self._idle()
            case "stopped":
                self.stopped = event
                self._idle()

    @property
    def state(self) -> Literal["waiting", "running", "short", "stopped", "finished"]:
        """The state of the run; ``waiting`` is before its start, ``stopped`` by an error."""
        if self.finish:
            return "finished"
        if self.stopped:
            return "stopped"
        if not self.start:
            return "waiting"
        return "short" if self.short else "running"

    @property
    def planned(self) -> int:
        """The number of rounds in the config; 0 if the journal does not say."""
        return int(self.section("federation").get("rounds") or 0)

    @property
    def wanted(self) -> int:
        """The number of uploads that a round wants; 0 if the journal does not say."""
        clients = int(self.start.get("clients") or 0)
        settings = self.section("federation")
        if settings.get("cohort"):
            return min(int(settings["cohort"]), clients)
        return max(int((settings.get("fraction") or 0) * clients + 1e-9), 1) if clients else 0

    @property
    def round(self) -> int:
        """The round in progress, or the last one; 0 before the first."""
        if self.finish or (self.planned and self.rounds >= self.planned):
            return self.rounds
        return self.rounds + 1 if self.start else 0

    @property
    def loss(self) -> float | None:
        """The mean training loss of the last round, in nats per token."""
        tokens = self.last_round.get("loss_tokens")
        return float(self.last_round["loss_total"] / tokens) if tokens else None

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens of the last round divided by the seconds of the whole round."""
        seconds = self.last_round.get("seconds")
        return float(self.last_round["tokens"] / seconds) if seconds else None

    @property
    def by_state(self) -> dict[State, int]:
        """The number of clients in each state."""
        busy = {state: len(names) for state, names in self.busy.items()}
        return {"idle": len(self.clients) - sum(busy.values()), **busy}

    def state_of(self, name: str) -> State:
        """A client's state; ``lost`` stays until its next request or connection."""
        return next((state for state, names in self.busy.items() if name in names), "idle")

    def latest(self, most: int) -> Iterator[ClientState]:
        """At most this number of clients, the most recently active first."""
        return islice(reversed(self.clients.values()), most)

    def section(self, name: str) -> dict[str, Any]:
        """A section of the run's config; empty if the journal does not have it."""
        settings = (self.start.get("config") or {}).get(name)
        return settings if isinstance(settings, dict) else {}

    def _log(self, event: Event) -> None:
        """Keep what happened to the run or to a client, other than its uploads."""
        name, reason = event.get("client"), str(event.get("reason", ""))
        who = "a client" if name is None else f"client {shortened(str(name))}"
        bad = False
        match event["event"]:
            case "start":
                text = "run resumed" if event.get("resumed") else "run started"
            case "joined":
                text = f"{who} connected"
            case "refused":
                text, bad = f"{who} was rejected: {reason}", True
            case "lost" if loss_kind(event) is LossKind.NOT_NEEDED:
                text = f"upload from {who} not used: enough uploads had arrived"
            case "lost":
                text, bad = f"no usable upload from {who}: {reason}", True
            case "clipped":
                text = (
                    f"upload from {who} scaled down: {event['ratio']:.3g} times the median change"
                )
            case "limited":
                text = (
                    f"{counted(len(event['shares']), 'client')} above the largest share count less"
                )
            case "kept":
                text, bad = f"the model stays as before the round: {reason}", True
            case "stray":
                text = f"late or repeated answer from {who}, ignored: {reason}"
            case "short":
                text, bad = f"{event['received']} of {event['quorum']} uploads for the quorum", True
            case "round":
                text = f"round aggregated: {counted(event.get('received') or 0, 'upload')}"
            case "evaluation":
                text = f"evaluated: {shortened(str(event['adapter']))}"
            case "client_evaluation":
                missing = len(event["missing"])
                text = f"{counted(len(event['clients']), 'client')} evaluated rows of their own"
                text += f"; {missing:,} did not" if missing else ""
            case "damaged":
                text, bad = f"damaged: {reason}", True
            case "certificate":
                text, bad = str(event["note"]), not event["renewed"]
            case "stopped":
                text, bad = f"run stopped: {reason}", True
            case "finish":
                text = "run finished"
            case _:
                return
        self.log.append(LogEntry(event.get("time"), event.get("round"), text, bad))

    def _started(self, event: Event) -> None:
        # A resumed run repeats its unfinished round from the beginning.
        self.start, self.finish, self.short, self.stopped = event, None, None, None
        self._idle()

    def _joined(self, event: Event) -> None:
        client = self._client(event)
        client.rank_type = event.get("rank_type", "")
        client.ranks = tuple(event.get("ranks", ()))
        client.examples = event.get("examples")
        client.device = event.get("device") or ""
        client.tokens_per_second = client.tokens_per_second or event.get("tokens_per_second")
        self.busy["lost"].discard(client.name)

    def _client_event(self, event: Event) -> None:
        if event["round"] > self.current:
            self.current, self.short = event["round"], None
            self._idle()
        client = self._client(event)
        match event["event"]:
            case "asked":
                client.since = event.get("time")
                self._set_state("training", client)
            case "client":
                self._answered(client, event)
            case "lost":
                self._lost(client, loss_kind(event), event["reason"])
            case "stray":
                self.totals["strays"] += 1

    def _lost(self, client: ClientState, kind: LossKind, reason: str) -> None:
        self.losses[kind] += 1
        client.loss_kind = kind
        if kind is not LossKind.NOT_NEEDED:
            client.reason = reason
        # A client that was not needed did nothing wrong.
        failed = kind is not LossKind.NOT_NEEDED
        client.lost += failed
        self._set_state("lost" if failed else "idle", client)

    def _answered(self, client: ClientState, event: Event) -> None:
        client.rank_type = event["rank_type"]
        # Ranks that a joining client stated are its own; others are those of its type.
        types = self.start.get("ranks") or {}
        client.ranks = client.ranks or tuple(types.get(client.rank_type, ()))
        client.examples = event["examples"]
        client.turns, client.loss_kind = client.turns + 1, None
        client.bytes_up += event["bytes_up"]
        client.bytes_down += event["bytes_down"]
        if event["seconds"]:
            client.tokens_per_second = event["tokens"] / event["seconds"]
        for key in ("tokens", "bytes_up", "bytes_down"):
            self.totals[key] += event[key]
        self.totals["uploads"] += 1
        self._set_state("answered", client)
        if self.short and len(self.busy["answered"]) >= self.short["quorum"]:
            self.short = None

    def _round(self, event: Event) -> None:
        self.rounds, self.current = event["round"], max(self.current, event["round"])
        self.last_round, self.short = event, None
        self.totals["rounds"] += 1
        if self.loss is not None:
            self.losses_by_round[event["round"]] = self.loss
        self._idle()

    def _evaluated(self, event: Event) -> None:
        for group, seen in (("seen", True), ("unseen", False)):
            rows = [row for row in event["clients"] if row["seen"] is seen]
            if rows:
                averages: dict[str, Any] = {**mean_scores(rows)}
                scores = Scores(event["adapter"], group, event["round"], **averages)
                self.scores[event["adapter"], group] = scores
                if event["adapter"] in ("base", "global"):
                    self.curves.setdefault(group, {})[event["round"]] = scores.loss

    def _client(self, event: Event) -> ClientState:
        """The client of an event, which becomes the most recently active."""
        name = event["client"]
        client = self.clients.pop(name, None) or ClientState(name)
        self.clients[name] = client
        if event["event"] in ("joined", "client", "stray"):
            client.seen = event.get("time", client.seen)
        return client

    def _set_state(self, state: State, client: ClientState) -> None:
        for names in self.busy.values():
            names.discard(client.name)
        if state != "idle":
            self.busy[state].add(client.name)

    def _idle(self) -> None:
        self.busy["training"].clear()
        self.busy["answered"].clear()
