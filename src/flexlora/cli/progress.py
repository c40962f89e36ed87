"""The progress of a run: a live line and lasting ones on a terminal, plain lines elsewhere."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from flexlora.journal import (
    Event,
    LossKind,
    age,
    counted,
    duration,
    loss_kind,
    mean_scores,
    number,
    size,
)
from flexlora.reporting.watch import RunState

WIDE = 110
"""From this number of columns on the live line also shows speed and bytes."""

_KEEP = "\N{NO-BREAK SPACE}"


def show(events: Iterable[Event], console: Console, turns: int) -> list[Event]:
    """Print a run's events as they come and return them.

    ``turns`` is the number of uploads that the remaining rounds want; it is used where the journal
    does not say how many a round wants.
    """
    seen: list[Event] = []
    tally = Tally(turns)
    live = console.is_terminal
    with Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=12),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}", markup=False),
        console=console,
        disable=not live,
    ) as bar:
        task = bar.add_task("starting", total=1.0, left="")
        for event in events:
            seen.append(event)
            tally.add(event)
            line = tally.line(console.width >= WIDE)
            bar.update(task, description=line, completed=tally.share, left=tally.left_text())
            for text in sentences(event, tally):
                if not (live and event["event"] == "client"):
                    lines = _wrapped(text, console.width) if live else text.replace(_KEEP, " ")
                    bar.console.print(lines, highlight=False, markup=False, soft_wrap=True)
    return seen


@dataclass
class Tally:
    """What a run is doing, how far it is, and how long the rest will take.

    The time left is estimated from the rounds since this process started or resumed the run: an
    evaluation before them does not count, one after them does.
    """

    turns: int
    now: RunState = field(default_factory=RunState)
    uploads: int = 0
    tokens: int = 0
    seconds: float = 0.0
    first_round: int = 0
    rounds_began: float = 0.0
    base_due: bool = False
    evaluates: bool = True
    evaluation_seconds: float = 0.0
    doing: str = "starting"

    def add(self, event: Event) -> None:
        """Account for the next event."""
        self.now.add(event)
        match event["event"]:
            case "start":
                self._started(event)
            case "asked" | "client" | "lost" | "stray" | "short":
                self._in_round(event)
            case "round":
                self._in_round(event)
                self.uploads = 0
                self.doing = self._after_round(event["round"])
            case "evaluation":
                self._evaluated(event)
            case "finish":
                self.doing = "finished"

    @property
    def wanted(self) -> int:
        """The number of uploads that a round wants; 0 if nothing says so."""
        return self.now.wanted or -(-self.turns // max(self.now.planned, 1))

    @property
    def share(self) -> float:
        """The part of the run that is done, from 0 to 1; of all its rounds, also when resumed."""
        return min(self._rounds_done() / self.now.planned, 1.0) if self.now.planned else 0.0

    @property
    def speed(self) -> float:
        """Tokens per second of local training."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def left(self) -> float | None:
        """The seconds left, at the speed so far; None while there is nothing to judge from."""
        done = self._rounds_done() - (self.first_round - 1)
        planned = self.now.planned
        if not planned or not self.first_round or done <= 0 or self.now.finish:
            return None
        elapsed = time.perf_counter() - self.rounds_began
        rest = max(planned - self._rounds_done(), 0.0)
        if not rest:
            return None
        return elapsed / done * rest + self._last_evaluation()

    def left_text(self) -> str:
        """The time left in words, or nothing."""
        left = self.left()
        return "" if left is None else f"about {age(left)} left"

    def line(self, wide: bool) -> str:
        """The live line: what the run is doing, in a ``wide`` one also its speed and bytes."""
        if not wide or not self.tokens:
            return self.doing
        up, down = (size(self.now.totals[key]) for key in ("bytes_up", "bytes_down"))
        return f"{self.doing}  {self.speed:,.0f} tokens/s  up {up}  down {down}"

    def _started(self, event: Event) -> None:
        evaluation = (event.get("config") or {}).get("evaluation") or {}
        resumed = bool(event.get("resumed"))
        self.base_due = bool(evaluation.get("base")) and not resumed
        waiting = "resuming the run" if resumed else "starting the first round"
        self.doing = "evaluating the base model" if self.base_due else waiting
        self.rounds_began = time.perf_counter()

    def _in_round(self, event: Event) -> None:
        if not self.first_round:
            self.first_round = event["round"]
            # An evaluation that was due and did not come: there are no rows to evaluate on.
            self.evaluates = not self.base_due
        if event["event"] == "client":
            self.uploads += 1
            self.tokens += event["tokens"]
            self.seconds += event["seconds"]
        self.doing = self._training(event["round"])

    def _training(self, number: int) -> str:
        planned = f"/{self.now.planned}" if self.now.planned else ""
        wanted, uploads = self.wanted, self.uploads
        if self.now.state == "short":
            return f"round {number}{planned}: waiting for more clients"
        if wanted and uploads >= wanted:
            return f"round {number}{planned}: aggregating"
        of = f" of {wanted}" if wanted else ""
        return f"round {number}{planned}: training, {uploads}{of} uploads"

    def _after_round(self, number: int) -> str:
        settings = (self.now.start.get("config") or {}).get("evaluation") or {}
        every, last = settings.get("every") or 0, number >= self.now.planned > 0
        if self.evaluates and (last or (every and number % every == 0)):
            return "evaluating the trained adapter" if last else f"evaluating after round {number}"
        return "finishing" if last else self._training(number + 1)

    def _evaluated(self, event: Event) -> None:
        self.base_due, self.evaluates = False, True
        self.evaluation_seconds = event.get("seconds") or 0.0
        if not self.first_round:
            self.rounds_began = time.perf_counter()
        last = event["round"] >= self.now.planned > 0
        self.doing = "finishing" if last else self._training(event["round"] + 1)

    def _last_evaluation(self) -> float:
        """The seconds that the evaluation after the last round will take."""
        settings = (self.now.start.get("config") or {}).get("evaluation") or {}
        types = len(self.now.start.get("rank_types") or {}) if settings.get("truncated") else 1
        return self.evaluation_seconds * max(types, 1) if self.evaluates else 0.0

    def _rounds_done(self) -> float:
        before = max(self.now.rounds, self.first_round - 1)
        return before + (min(self.uploads / self.wanted, 1.0) if self.wanted else 0.0)


def sentences(event: Event, tally: Tally) -> list[str]:
    """One event as lines of text; none for those that say nothing to a reader.

    Spaces that must not become line breaks are no-break spaces.
    """
    match event["event"]:
        case "start":
            return [_start(event), *notices(event.get("notices", ()))]
        case "client":
            return [_client(event, tally)]
        case "lost":
            return [_lost(event)]
        case "stray":
            return [f"round {event['round']}: late answer of {event['client']} ignored"]
        case "short":
            return [_short(event)]
        case "round":
            return [_round(event)]
        case "evaluation":
            return _evaluation(event)
    return []


def notices(texts: Iterable[str]) -> list[str]:
    """The notices of a prepared run as lines of text."""
    return [f"note: {text}" for text in texts]


def _start(event: Event) -> str:
    types = ", ".join(
        f"{_keep(f'{n} of type')} {name} ({_keep(_ranks(event['ranks'][name]))})"
        for name, n in event["rank_types"].items()
    )
    return (
        f"{_keep(counted(event['clients'], 'client'))}: {types}; "
        f"{_keep(counted(event['unseen_clients'], 'held-out client'))}; "
        f"{_keep(counted(event['modules'], 'adapted module'))}; {event['hardware']}"
    )


def _ranks(ranks: list[int]) -> str:
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {' and '.join(map(str, ranks))}"


def _client(event: Event, tally: Tally) -> str:
    left = tally.left_text()
    of = f" of {tally.wanted}" if tally.wanted else ""
    return (
        f"  round {event['round']}: client {event['client']} ({event['rank_type']}): "
        f"loss {_loss(event):.3f}, {event['tokens']:,} tokens in {duration(event['seconds'], 1)}, "
        f"upload {tally.uploads}{of}{f', {left}' if left else ''}"
    )


def _lost(event: Event) -> str:
    round_, client, kind = event["round"], event["client"], loss_kind(event)
    if kind is LossKind.NOT_NEEDED:
        text = f"upload of {client} not used (enough uploads had arrived)"
    else:
        reason = "" if kind is LossKind.OTHER else f" ({kind.text})"
        text = f"client {client} failed{reason}: {event['reason']}"
    return f"  round {round_}: {text}"


def _short(event: Event) -> str:
    return (
        f"round {event['round']}: {_keep(counted(event['received'], 'upload'))} after attempt "
        f"{event['attempt']}, {event['quorum']} needed"
    )


def _round(event: Event) -> str:
    rate = event["tokens"] / event["seconds"] if event["seconds"] else None
    parts = (
        f"loss {_loss(event):.3f}",
        number(rate, 0, " tokens/s"),
        f"up {size(event['bytes_up'])}",
        f"down {size(event['bytes_down'])}",
        f"{duration(event['seconds'])} ({duration(event['aggregate_seconds'], 1)} aggregation)",
    )
    return f"round {event['round']}: {', '.join(map(_keep, parts))}"


def _evaluation(event: Event) -> list[str]:
    names = {"base": "the base model", "global": "the global adapter"}
    adapter = event["adapter"]
    name = names.get(adapter, f"the global adapter truncated to type {adapter}")
    when = f"after round {event['round']}" if event["round"] else "before training"
    lines = [f"evaluation of {name} {when}:"]
    for group, seen in (("seen", True), ("unseen", False)):
        rows = [row for row in event["clients"] if row["seen"] is seen]
        if rows:
            lines.append(f"  {_keep(f'{group:<6} clients')}  {_scores(rows)}")
    return lines


def _scores(rows: list[dict[str, Any]]) -> str:
    mean = mean_scores(rows)
    parts = (
        f"Rouge-L {mean['rouge_l']:.1f} %",
        f"exact match {mean['exact_match']:.1f} %",
        f"loss {mean['loss']:.3f}",
    )
    return ", ".join(map(_keep, parts))


def _loss(event: Event) -> float:
    """The mean loss; a client may report no token of loss."""
    return float(event["loss_total"] / max(event["loss_tokens"], 1))


def _keep(text: str) -> str:
    """The text as one word, which is not broken at the end of a line."""
    return text.replace(" ", _KEEP)


def _wrapped(text: str, width: int) -> str:
    """The text in lines of at most this width, broken between words, later ones indented."""
    indent = " " * (len(text) - len(text.lstrip()) + 4)
    lines = textwrap.wrap(
        text,
        max(width, 20),
        subsequent_indent=indent,
        break_on_hyphens=False,
        break_long_words=False,
    ) or [text]
    return "\n".join(lines).replace(_KEEP, " ")
