"""What a run is doing and how far it is, from its events."""

from __future__ import annotations

from dataclasses import dataclass, field

from flexlora.journal import Event, age
from flexlora.reporting.watch import Estimate, RunState, TimeLeft


@dataclass
class Tally:
    """The state of a run, its uploads in the round in progress, and its time left."""

    now: RunState = field(default_factory=RunState)
    uploads: int = 0
    tokens: int = 0
    seconds: float = 0.0
    rounds_done: int = 0
    doing: str = "starting"
    time_left: TimeLeft = field(init=False)

    def __post_init__(self) -> None:
        self.time_left = TimeLeft(self.now)

    def next_run(self) -> Tally:
        """The tally of another run on the same model: evaluations take as long as in this one."""
        tally = Tally()
        tally.time_left.adapters_timed = self.time_left.adapters_timed
        tally.time_left.evaluation_seconds = self.time_left.evaluation_seconds
        return tally

    def add(self, event: Event) -> None:
        """Account for the next event."""
        self.now.add(event)
        self.time_left.add(event)
        match event["event"]:
            case "start":
                self._started(event)
            case "asked" | "client" | "lost" | "stray" | "short":
                self._in_round(event)
            case "round":
                self.uploads, self.rounds_done = 0, event["round"]
                self.doing = self._after_round(event["round"])
            case "evaluation":
                self.doing = self._next(event["round"])
            case "finish":
                self.doing = "finished"

    @property
    def share(self) -> float:
        """The part of the rounds that is done, from 0 to 1; of all, also when resumed."""
        if not self.now.planned:
            return 0.0
        part = min(self.uploads / self.now.wanted, 1.0) if self.now.wanted else 0.0
        return min((self.rounds_done + part) / self.now.planned, 1.0)

    @property
    def speed(self) -> float:
        """Tokens per second of local training."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def _started(self, event: Event) -> None:
        self.rounds_done = event.get("rounds_done") or 0
        waiting = "resuming the run" if event.get("resumed") else "starting the first round"
        is_base_due = not self.rounds_done and self.time_left.adapters_after(0)
        self.doing = "evaluating the base model" if is_base_due else waiting

    def _in_round(self, event: Event) -> None:
        self.rounds_done = max(self.rounds_done, event["round"] - 1)
        if event["event"] == "client":
            self.uploads += 1
            self.tokens += event["tokens"]
            self.seconds += event["seconds"]
        self.doing = self._training(event["round"])

    def _training(self, number: int) -> str:
        planned = f"/{self.now.planned}" if self.now.planned else ""
        wanted, uploads = self.now.wanted, self.uploads
        if self.now.state == "short":
            return f"round {number}{planned}: waiting for more clients"
        if wanted and uploads >= wanted:
            return f"round {number}{planned}: aggregating"
        of = f" of {wanted}" if wanted else ""
        return f"round {number}{planned}: training, {uploads}{of} uploads"

    def _after_round(self, number: int) -> str:
        if not self.time_left.adapters_after(number):
            return self._next(number)
        is_last = number >= self.now.planned > 0
        return "evaluating the trained adapter" if is_last else f"evaluating after round {number}"

    def _next(self, number: int) -> str:
        return "finishing" if number >= self.now.planned > 0 else self._training(number + 1)


def left_text(estimate: Estimate | None) -> str:
    """The time left in words; nothing if it is not known or under a second."""
    if estimate is None:
        return ""
    parts = [f"about {age(estimate.seconds)}"] if estimate.seconds >= 1 else []
    parts += ["evaluation"] if estimate.without_evaluations else []
    return f"{' + '.join(parts)} left" if parts else ""
