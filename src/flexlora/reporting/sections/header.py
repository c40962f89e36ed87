"""The head of a report: what ran, its main result in sentences, and what went wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from flexlora.journal import Event, LossKind, counted, duration, number
from flexlora.reporting import tables
from flexlora.reporting.document import Header
from flexlora.reporting.tables import EvaluationRow, Metric, RankTypeRow, RunFacts


def header(
    name: str, facts: RunFacts, events: Sequence[Event], rows: Sequence[EvaluationRow]
) -> Header:
    """The head of the report of the run called ``name``, which may be empty."""
    course = _course(facts, events)
    return Header(
        title=f"Run report: {name}" if name else "Run report",
        subtitle=_subtitle(facts),
        outcome=outcome(facts, events, rows),
        notes=[" ".join(course)] if course else [],
        facts=_facts(facts, tables.rank_type_table(events)),
    )


def outcome(facts: RunFacts, events: Sequence[Event], rows: Sequence[EvaluationRow]) -> str:
    """The main result in one or two sentences, with its numbers.

    Scores are those of the global adapter on unseen clients, or on seen ones if no others were
    evaluated; without any evaluation it is the training loss.
    """
    metric = tables.main_metric(rows)
    group = "unseen" if any(r.group == "unseen" for r in tables.trajectory(rows)) else "seen"
    first, last = tables.before_and_after(rows, group)
    if metric and last and last.score(metric) is not None:
        return " ".join([_gain(metric, first, last), *_loss(metric, first, last)])
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
    return ", ".join(map(_rank_type, rows))


def flat(value: Any) -> str:
    """A nested value on one line of text."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {flat(inner)}" for key, inner in value.items())
    if isinstance(value, list):
        return ", ".join(map(flat, value))
    return "" if value is None else str(value)


def _rank_type(row: RankTypeRow) -> str:
    ranks = f" of rank {' and '.join(map(str, row.ranks))}" if row.ranks else ""
    return f"{row.name} ({counted(row.clients, 'client')}{ranks})"


def _gain(metric: Metric, first: EvaluationRow | None, last: EvaluationRow) -> str:
    after = last.score(metric)
    before = first.score(metric) if first else None
    clients = counted(last.clients, f"{last.group} client")
    on = f"{clients} ({counted(last.examples, 'example')})"
    unit = " %" if metric.unit == "%" else f" {metric.unit}"
    if after is None or before is None:
        return (
            f"{metric.title} on {on} is {number(after, 2)}{unit} after round {last.round}; "
            "it was not measured before training."
        )
    points = "points" if metric.unit == "%" else metric.unit
    rounds = counted(last.round, "round")
    if after == before:
        return f"{metric.title} on {on} stayed at {number(after, 2)}{unit} in {rounds}."
    return (
        f"{metric.title} on {on} {'rose' if after > before else 'fell'} from "
        f"{number(before, 2)} to {number(after, 2)}{unit} ({after - before:+.2f} {points}) in "
        f"{rounds}."
    )


def _loss(metric: Metric, first: EvaluationRow | None, last: EvaluationRow) -> list[str]:
    """The change of the loss beside that of another metric, if it was measured."""
    if metric.key == "loss" or first is None or first.loss is None or last.loss is None:
        return []
    return [f"The loss went from {first.loss:.3f} to {last.loss:.3f} nats per token."]


def _subtitle(facts: RunFacts) -> str:
    trained = " on ".join(text for text in (facts.method, facts.base_model) if text)
    if facts.started is None:
        return trained
    started = f"started {datetime.fromtimestamp(facts.started, UTC):%Y-%m-%d %H:%M} UTC"
    return f"{trained}, {started}" if trained else started


def _facts(facts: RunFacts, types: Sequence[RankTypeRow]) -> list[tuple[str, str]]:
    planned = "" if facts.rounds_planned is None else f" of {facts.rounds_planned:,}"
    values: dict[str, Any] = {
        "Method": facts.method,
        "Base model": facts.base_model,
        "Rank types": rank_types(types),
        "Clients": client_count(facts),
        "Rounds completed": f"{facts.rounds_done:,}{planned}",
        "Adapted modules": facts.modules,
        "Seed": facts.seed,
        "flexlora": facts.version,
        "Hardware": flat(facts.hardware),
        "Time": None if facts.seconds is None else duration(facts.seconds, digits=1),
        "Global adapter": facts.adapter or "not written: the run is not complete",
    }
    return [
        (label, "not recorded" if value in (None, "") else str(value))
        for label, value in values.items()
    ]


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
