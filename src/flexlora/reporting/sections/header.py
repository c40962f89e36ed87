"""The head of a report: what ran, its main result in sentences, and what went wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from flexlora.journal import NOTHING, Event, LossKind, counted, duration, number
from flexlora.reporting import tables
from flexlora.reporting.document import Header, Link
from flexlora.reporting.names import shortened
from flexlora.reporting.run_files import RunFiles
from flexlora.reporting.tables import (
    METRICS,
    EvaluationRow,
    Interval,
    Metric,
    RankTypeRow,
    RunFacts,
)

INTERVALS = "Intervals are 95 %: bootstrapped over clients, for exact match Wilson's over examples."


def title(name: str) -> str:
    """The title of the report of the run called ``name``, which may be empty."""
    return f"{name} — flexlora run report" if name else "flexlora run report"


def header(
    name: str,
    facts: RunFacts,
    events: Sequence[Event],
    rows: Sequence[EvaluationRow],
    files: RunFiles,
) -> Header:
    """The head of the report of the run called ``name``, which may be empty."""
    course = _course(facts, events)
    return Header(
        title=title(name),
        subtitle=_subtitle(facts),
        outcome=outcome(facts, events, rows),
        notes=[*_other_scores(rows), *([" ".join(course)] if course else []), *facts.notices],
        facts=_facts(facts, tables.rank_type_table(events), files),
    )


def outcome(facts: RunFacts, events: Sequence[Event], rows: Sequence[EvaluationRow]) -> str:
    """The main result in one sentence, with its numbers.

    The score is that of the global adapter on unseen clients, or on seen ones if no others were
    evaluated; without any evaluation by the server it is the loss on the clients' own rows, and
    without that the training loss.
    """
    metric = tables.main_metric(rows)
    first, last = tables.before_and_after(rows, _main_group(rows))
    if metric and last and last.score(metric) is not None:
        return _gain(metric, first, last)
    if own := _own_rows(events):
        return own
    losses = [
        r for r in tables.training_table(events) if r.rank_type is None and r.loss is not None
    ]
    if losses:
        return (
            f"Training loss went from {losses[0].loss:.3f} nats per token in round "
            f"{losses[0].round} to {losses[-1].loss:.3f} in round {losses[-1].round}; the "
            "trained adapter was not evaluated."
        )
    if facts.rounds_done:
        return f"{counted(facts.rounds_done, 'round')} completed; nothing was evaluated."
    return "No round was completed, so there is no result."


def client_count(facts: RunFacts) -> str:
    """The number of clients that train, and of the unseen ones."""
    if facts.clients is None:
        return ""
    unseen = facts.unseen_clients
    return f"{facts.clients:,}" + (f" and {unseen:,} unseen" if unseen is not None else "")


def rank_types(rows: Sequence[RankTypeRow]) -> str:
    """The rank types with their clients and ranks."""
    return "; ".join(map(_rank_type, rows))


def local_training(facts: RunFacts) -> str:
    """What a client does in a round: steps or epochs, the batch and the optimizer."""
    steps, epochs = facts.setting("training.max_steps"), facts.setting("training.epochs")
    batch = facts.setting("training.batch_examples")
    amount = ""
    if isinstance(steps, int):
        amount = counted(steps, "step")
    elif isinstance(epochs, int):
        amount = counted(epochs, "epoch")
    size = f"batches of {counted(batch, 'example')}" if isinstance(batch, int) else ""
    parts = (amount, size, facts.setting("training.optimizer"))
    return ", ".join(str(part) for part in parts if part)


def learning_rate(facts: RunFacts) -> str:
    """The learning rate and its schedule."""
    rate, schedule = facts.setting("training.learning_rate"), facts.setting("training.schedule")
    if rate is None:
        return ""
    return f"{rate:g}, {schedule}" if schedule else f"{rate:g}"


def started(facts: RunFacts) -> str:
    """When the run was started, in UTC; empty if that was not recorded."""
    if facts.started is None:
        return ""
    return f"{datetime.fromtimestamp(facts.started, UTC):%Y-%m-%d %H:%M} UTC"


def flat(value: Any) -> str:
    """A nested value on one line of text."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {flat(inner)}" for key, inner in value.items())
    if isinstance(value, list):
        return ", ".join(map(flat, value))
    return "" if value is None else str(value)


def between(interval: Interval | None, digits: int, sign: str = "") -> str:
    """An interval as text, such as 8.1 to 13.6; a dash if there is none."""
    if interval is None:
        return NOTHING
    return f"{interval.low:{sign}.{digits}f} to {interval.high:{sign}.{digits}f}"


def _rank_type(row: RankTypeRow) -> str:
    ranks = f" of {row.ranks}" if row.ranks not in ("", row.name) else ""
    return f"{row.name} ({counted(row.clients, 'client')}{ranks})"


def _main_group(rows: Sequence[EvaluationRow]) -> str:
    return "unseen" if any(r.group == "unseen" for r in tables.trajectory(rows)) else "seen"


def _gain(metric: Metric, first: EvaluationRow | None, last: EvaluationRow) -> str:
    after = last.score(metric)
    before = first.score(metric) if first else None
    clients = counted(last.clients, f"{last.group} client")
    on = f"{clients} ({counted(last.examples, 'example')})"
    unit = " %" if metric.unit == "%" else f" {metric.unit}"
    if first is None or after is None or before is None:
        return (
            f"{metric.title} on {on} is {number(after, 2)}{unit}{_in_interval(last, metric)} after "
            f"round {last.round}; it was not measured before training."
        )
    points = "points" if metric.unit == "%" else metric.unit
    rounds = counted(last.round, "round")
    if after == before:
        return (
            f"{metric.title} on {on} stayed at {number(after, 2)}{unit}"
            f"{_in_interval(last, metric)} in {rounds}."
        )
    return (
        f"{metric.title} on {on} {'rose' if after > before else 'fell'} from "
        f"{number(before, 2)} to {number(after, 2)}{unit} ({after - before:+.2f} {points}"
        f"{_change(first, last, metric)}) in {rounds}."
    )


def _own_rows(events: Sequence[Event]) -> str:
    """The loss on the clients' own held-out rows; empty if no client evaluated."""
    rows = [r for r in tables.client_evaluation_table(events) if r.loss is not None]
    if not rows or not rows[-1].round:
        return ""
    first, last = rows[0], rows[-1]
    on = f"{counted(last.clients, 'client')} ({counted(last.examples, 'example')})"
    worst = ""
    if last.worst is not None and last.clients > 1:
        worst = f" The worst client is {shortened(last.worst)} at {number(last.highest, 3)}."
    change = f"is {number(last.loss, 3)}"
    if first.round == 0:
        change = f"went from {number(first.loss, 3)} to {number(last.loss, 3)}"
    return (
        f"Loss on the own held-out rows of {on} {change} nats per token after "
        f"{counted(last.round, 'round')}.{worst}"
    )


def _in_interval(row: EvaluationRow, metric: Metric) -> str:
    interval = row.interval(metric)
    return f" (95 % interval {between(interval, 2)})" if interval else ""


def _change(first: EvaluationRow, last: EvaluationRow, metric: Metric) -> str:
    interval = last.change(first, metric)
    if interval is None:
        return ""
    doubt = ", which contains no change" if interval.has_zero else ""
    return f"; 95 % interval {between(interval, 2, '+')}{doubt}"


def _other_scores(rows: Sequence[EvaluationRow]) -> list[str]:
    """The metrics beside the main one, and how the intervals were made."""
    main = tables.main_metric(rows)
    first, last = tables.before_and_after(rows, _main_group(rows))
    if last is None or main is None:
        return []
    sentences = []
    for metric in METRICS:
        after, before = last.score(metric), first.score(metric) if first else None
        if metric is main or after is None:
            continue
        unit, digits = (" %", 2) if metric.unit == "%" else (f" {metric.unit}", 3)
        interval = between(last.interval(metric), digits)
        start = "is" if before is None else f"went from {before:.{digits}f} to"
        start = "stayed at" if before == after else start
        told = f" (95 % interval {interval})" if interval != NOTHING else ""
        sentences.append(f"{metric.title} {start} {after:.{digits}f}{unit}{told}.")
    return [" ".join([*sentences, INTERVALS])]


def _subtitle(facts: RunFacts) -> str:
    trained = " on ".join(text for text in (facts.method, facts.base_model) if text)
    start = started(facts)
    begun = f"started {start}" if start else ""
    took = duration(facts.seconds, digits=1) if facts.seconds is not None else ""
    return ", ".join(part for part in (trained, begun, f"took {took}" if took else "") if part)


def _facts(
    facts: RunFacts, types: Sequence[RankTypeRow], files: RunFiles
) -> list[tuple[str, str | Link]]:
    planned = "" if facts.rounds_planned is None else f" of {facts.rounds_planned:,}"
    adapter = facts.adapter or "not written: the run is not complete"
    values: dict[str, Any] = {
        "Method": facts.method,
        "Base model": facts.base_model,
        "Rank types": rank_types(types),
        "Clients": client_count(facts),
        "Rounds completed": f"{facts.rounds_done:,}{planned}",
        "Local training per round": local_training(facts),
        "Learning rate": learning_rate(facts),
        "Adapted modules": facts.modules,
        "Seed": facts.seed,
        "flexlora": facts.version,
        "Hardware": flat(facts.hardware),
        "Global adapter": Link(files.adapter, files.adapter) if files.adapter else adapter,
        "Config": Link(files.config, files.config) if files.config else None,
        "All numbers": Link(files.journal, files.journal) if files.journal else None,
    }
    optional = ("Config", "All numbers", "Local training per round", "Learning rate")
    return [
        (label, value if isinstance(value, Link) else _recorded(value))
        for label, value in values.items()
        if value not in (None, "") or label not in optional
    ]


def _recorded(value: Any) -> str:
    return "not recorded" if value in (None, "") else str(value)


def _course(facts: RunFacts, events: Sequence[Event]) -> list[str]:
    """What was out of the ordinary: an early stop, a resume, clients without an upload."""
    sentences = []
    if not facts.finished:
        done = counted(facts.rounds_done, "completed round")
        sentences.append(f"The run is not complete: it has {done}.")
    if facts.resumed:
        sentences.append(f"It was resumed {counted(facts.resumed, 'time')}.")
    if facts.lost:
        kinds = ", ".join(
            f"{kind.text} ({n:,})"
            for kind, n in tables.loss_counts(events)
            if kind is not LossKind.NOT_NEEDED
        )
        sentences.append(f"Clients failed to return a usable upload {facts.lost:,} times: {kinds}.")
    if facts.not_needed:
        sentences.append(
            f"{counted(facts.not_needed, 'client round')} ended without an upload because enough "
            "others had arrived."
        )
    return sentences
