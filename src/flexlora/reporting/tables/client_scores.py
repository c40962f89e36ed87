"""The scores of single clients: how they differ, which is the worst, and who gained."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from flexlora.reporting.tables.scores import METRICS, EvaluationRow, Metric, trajectory

_LEAST_CLIENTS = 2


@dataclass(frozen=True)
class ClientSpread:
    """How the clients of a group differ after one evaluation, in the metric's unit.

    Every client counts once, whatever its number of examples; ``worst_tenth`` is the mean of the
    worst tenth of the clients, of at least one.
    """

    group: str
    round: int
    clients: int
    mean: float
    deviation: float
    worst: float
    worst_client: str
    worst_examples: int
    worst_tenth: float
    median: float
    best: float


@dataclass(frozen=True)
class ClientChange:
    """One client's score before and after training; ``before`` is None if it was not measured."""

    client: str
    group: str
    examples: int
    before: float | None
    after: float


def client_spread(row: EvaluationRow, metric: Metric) -> ClientSpread | None:
    """How the clients of this evaluation differ; None for fewer than two."""
    scored = [(score, c) for c in row.by_client if (score := c.score(metric)) is not None]
    if len(scored) < _LEAST_CLIENTS:
        return None
    # The worst first; of equal ones the one with the most examples.
    scored.sort(key=lambda s: (metric.gain(0.0, s[0]), -s[1].examples, s[1].client))
    values = [score for score, _ in scored]
    worst = scored[0][1]
    return ClientSpread(
        group=row.group,
        round=row.round,
        clients=len(values),
        mean=statistics.fmean(values),
        deviation=statistics.stdev(values),
        worst=values[0],
        worst_client=worst.client,
        worst_examples=worst.examples,
        worst_tenth=statistics.fmean(values[: max(len(values) // 10, 1)]),
        median=statistics.median(values),
        best=values[-1],
    )


def client_changes(
    first: EvaluationRow | None, last: EvaluationRow, metric: Metric
) -> list[ClientChange]:
    """Each client's score in ``last`` and, if it was evaluated, in ``first``, by name."""
    before = {c.client: c.score(metric) for c in first.by_client} if first else {}
    return [
        ClientChange(c.client, last.group, c.examples, before.get(c.client), score)
        for c in last.by_client
        if (score := c.score(metric)) is not None
    ]


def distinguishing_metric(rows: Iterable[EvaluationRow]) -> Metric | None:
    """The first of ``METRICS`` in which the clients of the last evaluation differ at all.

    None if no client was scored, or all are alike in every metric.
    """
    curve: Sequence[EvaluationRow] = trajectory(rows)
    last = max((r.round for r in curve), default=None)
    by_client = [c for r in curve if r.round == last for c in r.by_client]
    for metric in METRICS:
        scores = {score for c in by_client if (score := c.score(metric)) is not None}
        if len(scores) > 1:
            return metric
    return None
