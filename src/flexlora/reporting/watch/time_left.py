"""How long the rest of a run takes, from its events so far."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from flexlora.journal import Event
from flexlora.reporting.watch.run_state import RunState


@dataclass(frozen=True)
class Estimate:
    """The seconds left; ``without_evaluations`` if some are due and none was timed yet."""

    seconds: float
    without_evaluations: bool


@dataclass
class TimeLeft:
    """An estimate of the time left of ``run``, from the times of its events.

    Rounds and evaluations are timed apart. A round has two parts: until the last upload that it
    wants, and from there to its end. When a run is resumed, its rounds are timed anew: it may be
    on another machine. Add each event to ``run`` first; adding one costs constant time. ``since``
    is when the current part of the run began.
    """

    run: RunState
    phase: Literal["waiting", "evaluation", "round", "over"] = "waiting"
    round: int = 0
    since: float = 0.0
    uploads: int = 0
    last_upload: float = 0.0
    rounds_timed: int = 0
    training_seconds: float = 0.0
    closing_seconds: float = 0.0
    adapters_timed: int = 0
    adapters_due: int = 0
    evaluation_seconds: float = 0.0
    counted: tuple[float, float] = (0.0, 0.0)
    """The last share of an evaluation that ``left`` was told, and when it was new."""

    def add(self, event: Event) -> None:
        """Account for the next event; one without a time is ignored."""
        if "time" not in event:
            return
        match event["event"]:
            case "start":
                self._started(event)
            case "client":
                self._uploaded(event)
            case "round":
                self._aggregated(event)
            case "spectrum" | "client_evaluation":
                self._closed(event)
            case "evaluation":
                self._evaluated(event)
            case "finish" | "stopped":
                self.phase = "over"

    def left(self, now: float, share: float | None = None) -> Estimate | None:
        """The estimate at the time ``now``, in seconds since 1970; None if there is no basis.

        ``share`` is how much of an evaluation in progress is done, if that is known. Between two
        events the seconds never increase, and they are never negative.
        """
        if self.phase in ("waiting", "over") or not self.run.planned:
            return None
        a_round, is_round = self._round_seconds(), self.phase == "round"
        later_rounds = self.run.planned - self.round
        if a_round is None and (later_rounds or is_round):
            return None
        current = self._rest_of_round(now) if is_round else self._rest_of_evaluation(now, share)
        first = self.round if is_round else self.round + 1
        adapters = sum(self.adapters_after(n) for n in range(first, self.run.planned + 1))
        an_adapter = self.evaluation_seconds / max(self.adapters_timed, 1)
        seconds = (current or 0.0) + later_rounds * (a_round or 0.0) + adapters * an_adapter
        return Estimate(seconds, current is None or bool(adapters and not self.adapters_timed))

    def adapters_after(self, number: int) -> int:
        """How many adapters are evaluated after this round; 0 is before the first."""
        start, settings = self.run.start, self.run.section("evaluation")
        if not start.get("questions", 1):
            return 0
        if number == 0:
            return int(bool(settings.get("base")) and not start.get("resumed"))
        every, last = settings.get("every") or 0, number == self.run.planned
        if not (last or (every and number % every == 0)):
            return 0
        return 1 + (len(start.get("truncated") or ()) if last else 0)

    def _started(self, event: Event) -> None:
        self.since, self.round = event["time"], event.get("rounds_done") or 0
        self.rounds_timed, self.training_seconds, self.closing_seconds = 0, 0.0, 0.0
        if not self.round and self.adapters_after(0):
            self._expect_evaluation(self.adapters_after(0))
        else:
            self._expect_round(self.round + 1)

    def _uploaded(self, event: Event) -> None:
        if self.phase != "round" or event["round"] != self.round:
            self._expect_round(event["round"])
        self.uploads += 1
        if not self.run.wanted or self.uploads <= self.run.wanted:
            self.last_upload = event["time"]

    def _aggregated(self, event: Event) -> None:
        if self.phase != "round" or event["round"] != self.round:
            self._expect_round(event["round"])
        training = max(self.last_upload - self.since, 0.0)
        self.training_seconds += training
        self.closing_seconds += max(self._lap(event) - training, 0.0)
        self.rounds_timed += 1
        if adapters := self.adapters_after(event["round"]):
            self._expect_evaluation(adapters)
        else:
            self._expect_round(event["round"] + 1)

    def _closed(self, event: Event) -> None:
        """Add what comes after a round's own event to the time of the round."""
        seconds = self._lap(event)
        if self.rounds_timed:
            self.closing_seconds += seconds
        self.last_upload, self.counted = self.since, (0.0, self.since)

    def _evaluated(self, event: Event) -> None:
        self.evaluation_seconds += self._lap(event)
        self.adapters_timed += 1
        self.adapters_due -= 1
        if self.phase == "evaluation" and self.adapters_due <= 0:
            self._expect_round(event["round"] + 1)

    def _expect_evaluation(self, adapters: int) -> None:
        self.phase, self.adapters_due, self.counted = "evaluation", adapters, (0.0, self.since)

    def _expect_round(self, number: int) -> None:
        self.phase = "round" if number <= self.run.planned else "over"
        self.round, self.uploads, self.last_upload = number, 0, self.since

    def _lap(self, event: Event) -> float:
        """The seconds of the part of the run that this event ends."""
        seconds: float = max(event["time"] - self.since, 0.0)
        self.since = event["time"]
        return seconds

    def _round_seconds(self) -> float | None:
        """The seconds of a whole round, from those before or from the one in progress."""
        if self.rounds_timed:
            return (self.training_seconds + self.closing_seconds) / self.rounds_timed
        if not self.uploads or not self.run.wanted:
            return None
        return max(self.last_upload - self.since, 0.0) / min(self.uploads / self.run.wanted, 1.0)

    def _rest_of_round(self, now: float) -> float:
        """The seconds left of the round in progress, of which the time is known."""
        timed, wanted = self.rounds_timed, self.run.wanted
        training = self.training_seconds / timed if timed else self._round_seconds() or 0.0
        closing = self.closing_seconds / timed if timed else 0.0
        missing = 1 - min(self.uploads / wanted, 1.0) if wanted else 1.0
        waited = max(now - self.last_upload, 0.0)
        if not missing:
            return max(closing - waited, 0.0)
        return max(missing * training - waited, 0.0) + closing

    def _rest_of_evaluation(self, now: float, share: float | None) -> float | None:
        """The seconds left of the evaluation in progress; None if none was timed yet."""
        if share:
            if share != self.counted[0]:
                self.counted = (share, now)
            so_far = max(self.counted[1] - self.since, 0.0)
            return max(so_far * (1 - share) / share - (now - self.counted[1]), 0.0)
        if not self.adapters_timed:
            return None
        seconds = self.evaluation_seconds / self.adapters_timed * self.adapters_due
        return max(seconds - max(now - self.since, 0.0), 0.0)
