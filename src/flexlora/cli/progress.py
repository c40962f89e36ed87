"""A run as people watch it: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from flexlora.journal import Event, duration, mean_scores, size


def show(events: Iterable[Event], console: Console, turns: int) -> list[Event]:
    """Print a run's events as they come and return them; ``turns`` are those still to do."""
    seen: list[Event] = []
    tally = _Tally(turns)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.completed}/{task.total} turns"),
        TimeElapsedColumn(),
        console=console,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task("starting", total=turns)
        for event in events:
            seen.append(event)
            tally.add(event)
            bar.update(task, description=tally.line(), completed=tally.done)
            text = sentence(event, tally)
            if text and not (console.is_terminal and event["event"] == "client"):
                bar.console.print(text, highlight=False, markup=False, soft_wrap=True)
    return seen


class _Tally:
    """Sums over the turns so far, for the line that moves."""

    def __init__(self, turns: int) -> None:
        self.turns, self.done, self.round = turns, 0, 0
        self.tokens = self.bytes_up = self.bytes_down = 0
        self.seconds = 0.0
        self.started = time.perf_counter()

    def add(self, event: Event) -> None:
        if event["event"] == "lost":
            self.done += 1
        if event["event"] != "client":
            return
        self.done += 1
        self.round = event["round"]
        self.tokens += event["tokens"]
        self.seconds += event["seconds"]
        self.bytes_up += event["bytes_up"]
        self.bytes_down += event["bytes_down"]

    @property
    def speed(self) -> float:
        """Tokens trained on in a second of training."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def left(self) -> str:
        """The time left, as if the turns to come took as long as those so far."""
        if not self.done:
            return "?"
        elapsed = time.perf_counter() - self.started
        return duration(elapsed / self.done * (self.turns - self.done))

    def line(self) -> str:
        return (
            f"round {self.round}  {self.speed:.0f} tokens/s  up {size(self.bytes_up)}  "
            f"down {size(self.bytes_down)}  {self.left()} left"
        )


def sentence(event: Event, tally: _Tally) -> str:
    """One event as one line of text; empty for those that say nothing to a reader."""
    kind = event["event"]
    if kind == "start":
        types = ", ".join(f"{n} of {t} {event['ranks'][t]}" for t, n in event["rank_types"].items())
        return (
            f"{event['clients']} clients ({types}), {event['unseen_clients']} held out, "
            f"{event['modules']} modules; {event['hardware']}"
        )
    if kind == "client":
        return (
            f"  round {event['round']} client {event['client']} ({event['rank_type']}): "
            f"loss {_loss(event):.3f}, {event['tokens']} tokens in "
            f"{event['seconds']:.1f} s ({tally.done}/{tally.turns}, {tally.left()} left)"
        )
    if kind == "lost":
        return f"  round {event['round']} lost client {event['client']}: {event['reason']}"
    if kind == "round":
        return (
            f"round {event['round']}: loss {_loss(event):.3f}, "
            f"{event['tokens'] / event['seconds']:.0f} tokens/s overall, up "
            f"{size(event['bytes_up'])}, down {size(event['bytes_down'])}, "
            f"{event['seconds']:.0f} s ({event['aggregate_seconds']:.1f} s server)"
        )
    if kind == "evaluation":
        return f"evaluation of {event['adapter']} after round {event['round']}: " + "; ".join(
            _scores(name, [row for row in event["clients"] if row["seen"] is seen])
            for name, seen in (("seen", True), ("unseen", False))
            if any(row["seen"] is seen for row in event["clients"])
        )
    return ""


def _loss(event: Event) -> float:
    """The mean loss; a client may say that it has had no token of loss."""
    return float(event["loss_total"] / max(event["loss_tokens"], 1))


def _scores(name: str, rows: list[dict[str, Any]]) -> str:
    mean = mean_scores(rows)
    return (
        f"{name} clients Rouge-L {mean['rouge_l']:.1f}, exact {mean['exact_match']:.1f} %, "
        f"loss {mean['loss']:.3f}"
    )
