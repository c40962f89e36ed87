"""What the journal says, as rows: pure functions from events to frozen dataclasses.

Every mean is formed from totals: these are added first and divided once. What the journal
does not hold is ``None`` in a row, or no row at all; nothing is filled in.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flexlora.journal import Event, mean_scores


@dataclass(frozen=True)
class Metric:
    """A score of an evaluation: its name, its unit, and whether more of it is better."""

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
"""The metrics an evaluation may hold, the one to headline first."""


@dataclass(frozen=True)
class RunFacts:
    """What ran, as far as the journal tells; ``None`` is what it does not tell."""

    version: str | None
    method: str | None
    base_model: str | None
    seed: int | None
    clients: int | None
    unseen_clients: int | None
    rounds_planned: int | None
    rounds_done: int
    modules: int | None
    hardware: Any
    versions: Mapping[str, Any]
    config: Mapping[str, Any]
    resumed: int
    lost: int
    finished: bool
    seconds: float | None
    adapter: str | None


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

    def score(self, metric: Metric) -> float | None:
        """The value of one metric, or None where it was not measured."""
        value: float | None = getattr(self, metric.key)
        return value


@dataclass(frozen=True)
class TrainingRow:
    """The mean training loss of a round, in nats per token; all types where none is named."""

    round: int
    rank_type: str | None
    loss: float | None


@dataclass(frozen=True)
class RankTypeRow:
    """How many clients train at a rank type, and how many parameters each of them trains."""

    name: str
    clients: int
    trainable: int | None
    ranks: tuple[int, ...] = ()


@dataclass(frozen=True)
class SpectrumRow:
    """The singular values of one module's global update after one round, descending."""

    round: int
    module: str
    values: tuple[float, ...]


@dataclass(frozen=True)
class EnergyRow:
    """The share, in percent, of the energy in one block of ranks: the mean over modules."""

    round: int
    block: str
    share: float


@dataclass(frozen=True)
class KeptRow:
    """The energy, in percent, that truncation to a rank keeps: over modules."""

    round: int
    rank: int
    mean: float
    lowest: float
    highest: float


@dataclass(frozen=True)
class CategoryRow:
    """One category's score before and after training on the seen or unseen clients.

    ``gain`` is in the metric's unit and positive where the score became better.
    """

    category: str
    group: str
    examples: int
    before: float
    after: float
    gain: float


@dataclass(frozen=True)
class TrafficRow:
    """Bytes between server and clients in a round, and since the start."""

    round: int
    up: int
    down: int
    total_up: int
    total_down: int


@dataclass(frozen=True)
class TimeRow:
    """Seconds of a round: training and exchange, then aggregation."""

    round: int
    training: float
    aggregation: float


@dataclass(frozen=True)
class ClientRow:
    """One client over the whole run; ``examples`` counts every pass of every round."""

    client: str
    rank_types: tuple[str, ...]
    rounds: int
    lost: int
    last_reason: str | None
    examples: int
    bytes_up: int
    bytes_down: int
    last_loss: float | None


def run_facts(events: Sequence[Event]) -> RunFacts:
    """What ran. A resumed run is described by its last start."""
    starts = _of(events, "start")
    start = starts[-1] if starts else {}
    finish = next(iter(reversed(_of(events, "finish"))), {})
    config = start.get("config") or {}
    return RunFacts(
        version=start.get("version"),
        method=_setting(config, "method.name"),
        base_model=_setting(config, "model.name"),
        seed=_setting(config, "seed"),
        clients=_count(start.get("clients")),
        unseen_clients=_count(start.get("unseen_clients")),
        rounds_planned=_setting(config, "federation.rounds"),
        rounds_done=len(_rounds(events)),
        modules=_count(start.get("modules")),
        hardware=start.get("hardware"),
        versions=start.get("versions") or {},
        config=config,
        resumed=sum(bool(s.get("resumed")) for s in starts),
        lost=len(_of(events, "lost")),
        finished=bool(finish),
        seconds=finish.get("seconds"),
        adapter=finish.get("adapter"),
    )


def evaluation_table(events: Iterable[Event]) -> list[EvaluationRow]:
    """The scores by round and adapter, a row each for the seen and the unseen clients.

    Rounds ascend; the adapters of a round stand in the order in which they were evaluated.
    Where an evaluation was repeated after a resume, the last one counts. A client whose
    row does not say whether it was seen counts as seen.
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
                        clients=len(clients),
                        examples=sum(c.get("examples") or 0 for c in clients),
                        **{m.key: _score(clients, m) for m in METRICS},
                    )
                )
    return rows


def trajectory(rows: Iterable[EvaluationRow]) -> list[EvaluationRow]:
    """The rows that make a learning curve: the global adapter, from the base model at first.

    The base model stands for round 0 where the global adapter was not evaluated then.
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
    """The metric to headline: the first of ``METRICS`` that was measured."""
    rows = list(rows)
    measured = (m for m in METRICS if any(r.score(m) is not None for r in rows))
    return next(measured, None)


def training_table(events: Sequence[Event]) -> list[TrainingRow]:
    """The mean training loss of each finished round: of all clients, then by rank type."""
    rounds = _rounds(events)
    turns: dict[tuple[int, str], list[Event]] = defaultdict(list)
    for event in _turns(events):
        if event["round"] in rounds and event.get("rank_type") is not None:
            turns[event["round"], str(event["rank_type"])].append(event)
    rows = [TrainingRow(r, None, _loss([event])) for r, event in sorted(rounds.items())]
    types = sorted({name for _, name in turns}, key=_natural)
    for name in types:
        rows += [TrainingRow(r, name, _loss(turns[r, name])) for r in rounds if (r, name) in turns]
    return rows


def rank_type_table(events: Sequence[Event]) -> list[RankTypeRow]:
    """The rank types in use, as the run's start names them."""
    start = next(iter(reversed(_of(events, "start"))), {})
    trainable, ranks = start.get("trainable") or {}, start.get("ranks") or {}
    return [
        RankTypeRow(name, clients, trainable.get(name), tuple(ranks.get(name) or ()))
        for name, clients in (start.get("rank_types") or {}).items()
    ]


def spectrum_table(events: Iterable[Event]) -> list[SpectrumRow]:
    """The recorded singular values, by module and then by round."""
    rows = {
        (module, event["round"]): SpectrumRow(event["round"], module, tuple(values))
        for event in _of(events, "spectrum")
        for module, values in (event.get("values") or {}).items()
    }
    modules = {module: place for place, (module, _) in reversed(list(enumerate(rows)))}
    return sorted(rows.values(), key=lambda row: (modules[row.module], row.round))


def energy_table(events: Iterable[Event]) -> list[EnergyRow]:
    """The share of the energy in each block between rank levels, meaned over modules."""
    rows = []
    for round_, event in _energies(events).items():
        shares = list(event["energy"].values())
        for place, block in enumerate(_blocks(event["rank_levels"])):
            mean = sum(module[place] for module in shares) / len(shares)
            rows.append(EnergyRow(round_, block, 100 * mean))
    return rows


def kept_table(events: Iterable[Event]) -> list[KeptRow]:
    """The energy that truncation to each rank level keeps, at the last recorded spectrum."""
    energies = _energies(events)
    if not energies:
        return []
    round_, event = list(energies.items())[-1]
    rows = []
    for place, rank in enumerate(event["rank_levels"]):
        kept = [100 * sum(module[: place + 1]) for module in event["energy"].values()]
        rows.append(KeptRow(round_, rank, sum(kept) / len(kept), min(kept), max(kept)))
    return rows


def truncated_table(rows: Iterable[EvaluationRow]) -> list[EvaluationRow]:
    """The last round at which truncated adapters were evaluated, beside the global one.

    Empty where only the base model and the global adapter were.
    """
    rows = [r for r in rows if r.adapter != "base"]
    last = max((r.round for r in rows if r.adapter != "global"), default=None)
    return [r for r in rows if r.round == last]


def category_table(events: Sequence[Event], group: str) -> list[CategoryRow]:
    """Each category's score before and after training, the greatest gain first.

    The metric is that of ``main_metric``. Empty without an evaluation before training and
    one after it; a category that one of the two lacks is left out.
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
    found = []
    for category in before.keys() & after.keys():
        old, new = (_score(side[category], metric) for side in (before, after))
        if old is not None and new is not None:
            examples = sum(c.get("examples") or 0 for c in after[category])
            gain = metric.gain(old, new)
            found.append(CategoryRow(category, group, examples, old, new, gain))
    return sorted(found, key=lambda row: (-row.gain, row.category))


def traffic_table(events: Iterable[Event]) -> list[TrafficRow]:
    """The bytes of each finished round that counted them, and the sums so far."""
    rows: list[TrafficRow] = []
    total_up = total_down = 0
    for round_, event in sorted(_rounds(events).items()):
        up, down = event.get("bytes_up"), event.get("bytes_down")
        if up is not None and down is not None:
            total_up, total_down = total_up + up, total_down + down
            rows.append(TrafficRow(round_, up, down, total_up, total_down))
    return rows


def time_table(events: Iterable[Event]) -> list[TimeRow]:
    """The seconds of each finished round that measured both its whole and its aggregation."""
    return [
        TimeRow(round_, event["seconds"] - event["aggregate_seconds"], event["aggregate_seconds"])
        for round_, event in sorted(_rounds(events).items())
        if event.get("seconds") is not None and event.get("aggregate_seconds") is not None
    ]


def client_table(events: Sequence[Event]) -> list[ClientRow]:
    """What each client did, in natural order of the names; lost turns are counted apart."""
    turns: dict[str, list[Event]] = defaultdict(list)
    for event in _turns(events):
        turns[str(event["client"])].append(event)
    lost: dict[str, list[Event]] = defaultdict(list)
    for event in _of(events, "lost"):
        lost[str(event["client"])].append(event)
    return [
        _client_row(client, turns[client], lost[client])
        for client in sorted(turns.keys() | lost.keys(), key=_natural)
    ]


def lost_reasons(events: Iterable[Event]) -> list[tuple[str, int]]:
    """Why turns of clients were lost and how often, the most frequent reason first."""
    return Counter(str(e.get("reason")) for e in _of(events, "lost")).most_common()


def _client_row(client: str, turns: Sequence[Event], lost: Sequence[Event]) -> ClientRow:
    return ClientRow(
        client=client,
        rank_types=tuple(
            dict.fromkeys(str(t["rank_type"]) for t in turns if t.get("rank_type") is not None)
        ),
        rounds=len(turns),
        lost=len(lost),
        last_reason=str(lost[-1].get("reason")) if lost else None,
        examples=sum(t.get("examples") or 0 for t in turns),
        bytes_up=sum(t.get("bytes_up") or 0 for t in turns),
        bytes_down=sum(t.get("bytes_down") or 0 for t in turns),
        last_loss=_loss(turns[-1:]),
    )


def _of(events: Iterable[Event], kind: str) -> list[Event]:
    return [event for event in events if event["event"] == kind]


def _rounds(events: Iterable[Event]) -> dict[int, Event]:
    """The finished rounds by number; of one written twice, the last."""
    return dict(sorted((event["round"], event) for event in _last(events, "round", "round")))


def _turns(events: Iterable[Event]) -> list[Event]:
    return _last(events, "client", "round", "client")


def _evaluations(events: Iterable[Event]) -> list[Event]:
    return _last(events, "evaluation", "round", "adapter")


def _energies(events: Iterable[Event]) -> dict[int, Event]:
    found = _last(events, "spectrum", "round")
    whole = [e for e in found if e.get("energy") and e.get("rank_levels")]
    return {event["round"]: event for event in sorted(whole, key=lambda e: e["round"])}


def _last(events: Iterable[Event], kind: str, *keys: str) -> list[Event]:
    """The events of a kind; of those that agree in ``keys``, the last."""
    return list({tuple(e.get(k) for k in keys): e for e in _of(events, kind)}.values())


def _group(evaluation: Event, group: str) -> list[Mapping[str, Any]]:
    seen = group == "seen"
    return [c for c in evaluation.get("clients") or [] if bool(c.get("seen", True)) == seen]


def _by_category(
    clients: Iterable[Mapping[str, Any]],
) -> dict[str, list[Mapping[str, Any]]]:
    found: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for client in clients:
        if client.get("category") is not None:
            found[str(client["category"])].append(client)
    return found


def _score(clients: Iterable[Mapping[str, Any]], metric: Metric) -> float | None:
    """The mean over the clients that measured the metric; None if there is nothing to mean."""
    blank = {m.total: 0 for m in METRICS} | {m.count: 0 for m in METRICS}
    measured: list[Mapping[str, Any]] = [
        {**blank, metric.total: c[metric.total], metric.count: c[metric.count]}
        for c in clients
        if c.get(metric.total) is not None and c.get(metric.count)
    ]
    return mean_scores(measured)[metric.key] if measured else None


def _loss(events: Iterable[Event]) -> float | None:
    whole = [e for e in events if e.get("loss_total") is not None and e.get("loss_tokens")]
    tokens = sum(e["loss_tokens"] for e in whole)
    return sum(e["loss_total"] for e in whole) / tokens if tokens else None


def _blocks(levels: Sequence[int]) -> list[str]:
    starts = [1, *(level + 1 for level in levels)]
    inner = [f"{a}–{b}" if a < b else f"{b}" for a, b in zip(starts, levels, strict=False)]
    return [*inner, f"{starts[-1]} and beyond"]


def _setting(config: Mapping[str, Any], path: str) -> Any:
    """The plain value at a dotted path, None where there is none."""
    value: Any = config
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value if isinstance(value, str | int | float) else None


def _count(value: Any) -> int | None:
    """A count, or the length of what is to be counted."""
    if value is None or isinstance(value, int):
        return value
    return len(value)


def _natural(name: str) -> tuple[int, str]:
    """Shorter names first, so that client 9 stands before client 10."""
    return len(name), name
