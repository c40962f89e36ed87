"""Evaluations as rows: scores by round, adapter and group of clients, and by category."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flexlora.journal import Event, mean_scores
from flexlora.reporting.names import natural
from flexlora.reporting.tables.selection import last_of, total
from flexlora.reporting.tables.uncertainty import Interval, bootstrapped, wilson


@dataclass(frozen=True)
class Metric:
    """A score of an evaluation: its name, its unit, and whether a higher value is better.

    Its mean over clients is the sum of their field ``total`` divided by that of ``count``.
    """

    key: str
    title: str
    unit: str
    more_is_better: bool
    total: str
    count: str

    def gain(self, before: float, after: float) -> float:
        """How much better ``after`` is than ``before``, in the metric's unit."""
        return after - before if self.more_is_better else before - after


METRICS = (
    Metric("rouge_l", "Rouge-L", "%", True, "rouge_l", "examples"),
    Metric("exact_match", "Exact match", "%", True, "exact_match", "examples"),
    Metric("loss", "Loss", "nats per token", False, "loss_total", "loss_tokens"),
)
"""The metrics of an evaluation, the one to report first at the head."""


@dataclass(frozen=True)
class ClientScore:
    """One client's part of an evaluation: the sums of its rows, by field of the journal."""

    client: str
    examples: int
    sums: Mapping[str, float]

    def score(self, metric: Metric) -> float | None:
        """The client's mean, in the metric's unit; None if it was not measured."""
        return _score([self.sums], metric)


@dataclass(frozen=True)
class EvaluationRow:
    """One adapter's scores at one round on the ``seen`` or the ``unseen`` clients."""

    round: int
    adapter: str
    group: str
    clients: int
    examples: int
    rouge_l: float | None
    exact_match: float | None
    loss: float | None
    by_client: tuple[ClientScore, ...] = ()

    def score(self, metric: Metric) -> float | None:
        """The value of one metric, or None if it was not measured."""
        value: float | None = getattr(self, metric.key)
        return value

    def interval(self, metric: Metric) -> Interval | None:
        """The 95 % interval of the metric; None if there are too few clients for one."""
        score = self.score(metric)
        if metric.key == "exact_match":
            return wilson(score / 100, self.examples) if score is not None else None
        sums = [_ratio(c, metric) for c in self.by_client if c.score(metric) is not None]
        return bootstrapped(sums)

    def change(self, before: EvaluationRow, metric: Metric) -> Interval | None:
        """The 95 % interval of the change since ``before``, over the clients that both have."""
        earlier = {c.client: c for c in before.by_client if c.score(metric) is not None}
        both = [c for c in self.by_client if c.client in earlier and c.score(metric) is not None]
        return bootstrapped(
            [_ratio(c, metric) for c in both], [_ratio(earlier[c.client], metric) for c in both]
        )


@dataclass(frozen=True)
class CategoryRow:
    """One category's score before and after training on the seen or unseen clients.

    ``gain`` is in the metric's unit and positive if the score improved.
    """

    category: str
    group: str
    examples: int
    before: float
    after: float
    gain: float


@dataclass(frozen=True)
class ClientEvaluationRow:
    """The global adapter on the clients' own held-out rows after one round; 0 is the base model.

    Losses are in nats per token. ``loss`` is weighted by tokens; ``lowest``, ``highest`` and
    ``deviation`` are over the clients' own means, each counted once. ``worst`` is the client with
    the highest loss. All are None if no client evaluated.
    """

    round: int
    clients: int
    missing: int
    examples: int
    loss: float | None
    lowest: float | None
    highest: float | None
    deviation: float | None
    worst: str | None


@dataclass(frozen=True)
class ClientLossRow:
    """One client's loss on its own held-out rows, before training and after the last round.

    ``before`` is None if the base model was not evaluated by it.
    """

    client: str
    examples: int
    before: float | None
    after: float


def client_evaluation_table(events: Iterable[Event]) -> list[ClientEvaluationRow]:
    """The evaluations by the clients, rounds ascending; of a repeated one the last counts."""
    return [
        ClientEvaluationRow(
            round=event["round"],
            clients=len(event["clients"]),
            missing=len(event["missing"]),
            examples=total(event["clients"], "examples"),
            loss=event["loss"],
            lowest=event["loss_min"],
            highest=event["loss_max"],
            deviation=event["loss_std"],
            worst=event["worst"],
        )
        for event in _client_evaluations(events)
    ]


def client_loss_table(events: Iterable[Event]) -> list[ClientLossRow]:
    """The clients' own losses at their last evaluation, the highest first."""
    evaluations = [event for event in _client_evaluations(events) if event["clients"]]
    if not evaluations:
        return []
    first, last = evaluations[0], evaluations[-1]
    before = {row["client"]: _mean(row) for row in first["clients"]} if first["round"] == 0 else {}
    rows = [
        ClientLossRow(row["client"], row["examples"], before.get(row["client"]), _mean(row))
        for row in last["clients"]
    ]
    return sorted(rows, key=lambda row: (-row.after, row.client))


def _client_evaluations(events: Iterable[Event]) -> list[Event]:
    return sorted(last_of(events, "client_evaluation", "round"), key=lambda e: e["round"])


def _mean(row: Mapping[str, Any]) -> float:
    return float(row["loss_total"] / row["loss_tokens"])


def evaluation_table(events: Iterable[Event]) -> list[EvaluationRow]:
    """The scores by round and adapter, a row each for the seen and the unseen clients.

    Rounds ascend; the adapters of a round are in the order of their evaluation. If an evaluation
    was repeated after a resume, the last one counts. A client whose row does not say whether it
    was seen counts as seen.
    """
    rows = []
    for event in sorted(_evaluations(events), key=lambda e: e["round"]):
        for group in ("seen", "unseen"):
            clients = _group(event, group)
            if clients:
                rows.append(
                    EvaluationRow(
                        round=event["round"],
                        adapter=str(event.get("adapter", "global")),
                        group=group,
                        clients=len({str(c.get("client")) for c in clients}),
                        examples=total(clients, "examples"),
                        **{m.key: _score(clients, m) for m in METRICS},
                        by_client=_by_client(clients),
                    )
                )
    return rows


def trajectory(rows: Iterable[EvaluationRow]) -> list[EvaluationRow]:
    """The rows of the learning curve: those of the global adapter, after the base model's.

    The base model stands for round 0 if the global adapter was not evaluated then.
    """
    rows = list(rows)
    with_global = {(r.round, r.group) for r in rows if r.adapter == "global"}
    return [
        r
        for r in rows
        if r.adapter == "global"
        or (r.adapter == "base" and r.round == 0 and (0, r.group) not in with_global)
    ]


def before_and_after(
    rows: Iterable[EvaluationRow], group: str
) -> tuple[EvaluationRow | None, EvaluationRow | None]:
    """The first and the last row of a group's learning curve; None where there is none."""
    curve = [r for r in trajectory(rows) if r.group == group]
    first = curve[0] if curve and curve[0].round == 0 else None
    last = curve[-1] if curve and curve[-1].round > 0 else None
    return first, last


def main_metric(rows: Iterable[EvaluationRow]) -> Metric | None:
    """The metric to report first: the first of ``METRICS`` that was measured."""
    rows = list(rows)
    measured = (m for m in METRICS if any(r.score(m) is not None for r in rows))
    return next(measured, None)


def truncated_table(rows: Iterable[EvaluationRow]) -> list[EvaluationRow]:
    """The last round at which truncated adapters were evaluated, with the global adapter.

    Empty if only the base model and the global adapter were evaluated.
    """
    rows = [r for r in rows if r.adapter != "base"]
    last = max((r.round for r in rows if r.adapter != "global"), default=None)
    return [r for r in rows if r.round == last]


def category_table(events: Sequence[Event], group: str) -> list[CategoryRow]:
    """Each category's score before and after training, the greatest gain first.

    The metric is that of ``main_metric``. Empty without an evaluation before training and
    one after it; a category that is missing in one of the two is left out.
    """
    rows = evaluation_table(events)
    metric = main_metric(rows)
    first, last = before_and_after(rows, group)
    if metric is None or first is None or last is None:
        return []
    evaluations = {(e["round"], str(e.get("adapter", "global"))): e for e in _evaluations(events)}
    before, after = (
        _by_category(_group(evaluations[row.round, row.adapter], group)) for row in (first, last)
    )
    gains = []
    for category in before.keys() & after.keys():
        old, new = (_score(side[category], metric) for side in (before, after))
        if old is not None and new is not None:
            examples = total(after[category], "examples")
            gain = metric.gain(old, new)
            gains.append(CategoryRow(category, group, examples, old, new, gain))
    return sorted(gains, key=lambda row: (-row.gain, row.category))


def _evaluations(events: Iterable[Event]) -> list[Event]:
    return last_of(events, "evaluation", "round", "adapter")


def _group(evaluation: Event, group: str) -> list[dict[str, Any]]:
    seen = group == "seen"
    return [c for c in evaluation.get("clients") or [] if bool(c.get("seen", True)) == seen]


def _by_client(rows: Iterable[Mapping[str, Any]]) -> tuple[ClientScore, ...]:
    """The rows summed by client, in natural order of the names."""
    by_client: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        by_client[str(row.get("client"))].append(row)
    fields = [field for metric in METRICS for field in (metric.total, metric.count)]
    return tuple(
        ClientScore(
            client,
            total(by_client[client], "examples"),
            {
                field: total(by_client[client], field)
                for field in fields
                if any(row.get(field) is not None for row in by_client[client])
            },
        )
        for client in sorted(by_client, key=natural)
    )


def _ratio(client: ClientScore, metric: Metric) -> tuple[float, float]:
    """A sum and its count, whose quotient is in the metric's unit."""
    scale = 100 if metric.unit == "%" else 1
    return scale * client.sums[metric.total], client.sums[metric.count]


def _by_category(clients: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    by_category: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for client in clients:
        if client.get("category") is not None:
            by_category[str(client["category"])].append(client)
    return by_category


def _score(clients: Iterable[Mapping[str, Any]], metric: Metric) -> float | None:
    """The mean over the clients that measured the metric; None if none did."""
    blank = {m.total: 0 for m in METRICS} | {m.count: 0 for m in METRICS}
    measured: list[Mapping[str, Any]] = [
        {**blank, metric.total: c[metric.total], metric.count: c[metric.count]}
        for c in clients
        if c.get(metric.total) is not None and c.get(metric.count)
    ]
    return mean_scores(measured)[metric.key] if measured else None
