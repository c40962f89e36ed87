"""Methods side by side: from the journals of a comparison's runs to values.

Every number is a mean over seeds with the sample standard deviation. Only complete runs count:
numbers after different numbers of rounds do not compare.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from flexlora.federation import Outcome
from flexlora.journal import Event, Record
from flexlora.reporting import tables
from flexlora.reporting.tables import EvaluationRow, RunFacts

READ = ("start", "lost", "round", "spectrum", "evaluation", "finish")


@dataclass(frozen=True)
class Measured:
    """What the journal of one run contains.

    ``training`` is the loss by round; ``scores`` are of the global adapter by group of clients
    and round (0: the base model); ``energy`` is in percent by round and block of ranks; the
    last block lies beyond the largest rank in use. ``bytes_so_far`` are those of all rounds up to
    one, up and down; ``seconds`` are those of all rounds.
    """

    seed: int
    facts: RunFacts
    rank_types: tuple[tables.RankTypeRow, ...]
    training: Mapping[int, float]
    scores: Mapping[str, Mapping[int, EvaluationRow]]
    energy: Mapping[int, Mapping[str, float]]
    bytes_up: int | None
    bytes_down: int | None
    server_seconds: float | None
    bytes_so_far: Mapping[int, int]
    seconds: float | None

    def before(self, group: str) -> EvaluationRow | None:
        """The base model's score."""
        return self.scores.get(group, {}).get(0)

    def last(self, group: str) -> EvaluationRow | None:
        """The score after the last round that was evaluated."""
        return next(reversed(self._trained(group)), None)

    def best(self, group: str) -> EvaluationRow | None:
        """The score after the round with the lowest loss on this group; the first of equals."""
        rows = [(row.loss, row.round, row) for row in self._trained(group) if row.loss is not None]
        return min(rows)[2] if rows else None

    def _trained(self, group: str) -> list[EvaluationRow]:
        return [row for number, row in self.scores.get(group, {}).items() if number > 0]


@dataclass(frozen=True)
class Spread:
    """A mean over seeds; a single value has no standard deviation."""

    mean: float
    deviation: float | None
    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of at least one value."""
        deviation = statistics.stdev(values) if len(values) > 1 else None
        return cls(statistics.fmean(values), deviation, tuple(values))


Value = Callable[[Measured], float | None]
Series = Callable[[Measured], Mapping[int, float | None]]


@dataclass(frozen=True)
class Row:
    """One method: what its complete runs measured, and the ``others``, which are not complete.

    ``method`` is what it is called here, with the variant of the config if there are several;
    ``kind`` is the method alone. ``changes`` are the values of the variant by dotted key, ``own``
    those of the method.
    """

    method: str
    runs: tuple[Measured, ...]
    others: tuple[Outcome, ...]
    kind: str = ""
    variant: str = ""
    changes: Mapping[str, Any] = field(default_factory=dict)
    own: Mapping[str, Any] = field(default_factory=dict)

    def spread(self, value: Value) -> Spread | None:
        """A value over the seeds; None if one of them lacks it."""
        values = [v for run in self.runs if (v := value(run)) is not None]
        return Spread.of(values) if values and len(values) == len(self.runs) else None

    def by_round(self, series: Series) -> dict[int, Spread]:
        """A series round by round, each over the seeds that have the round."""
        by_round: dict[int, list[float]] = {}
        for run in self.runs:
            for number, value in series(run).items():
                if value is not None:
                    by_round.setdefault(number, []).append(value)
        return {number: Spread.of(by_round[number]) for number in sorted(by_round)}

    @property
    def refused(self) -> bool:
        """Whether the method is incompatible with the config, with every seed."""
        states = {other.state for other in self.others}
        return not self.runs and states == {"refused"}

    @property
    def state(self) -> str:
        """Why runs are missing, in words; empty if none is."""
        if self.refused:
            # The reasons differ only in what each seed drew.
            return f"refused: {self.others[0].reason}"
        reasons: dict[str, list[str]] = {}
        for other in self.others:
            text = f"{other.state}: {other.reason}" if other.reason else "not completed"
            reasons.setdefault(text, []).append(str(other.cell.seed))
        return "; ".join(f"seed {', '.join(seeds)} {text}" for text, seeds in reasons.items())


@dataclass(frozen=True)
class Standing:
    """A method against the best: how far ``behind``, over the seeds that both have.

    ``level``: the mean is behind by at most the larger of the two standard deviations
    (None: one seed has none). ``always``: it is behind on every seed.
    """

    behind: Spread
    level: bool | None
    always: bool


@dataclass(frozen=True)
class Comparison:
    """All methods, the best first: those with every seed by loss, then those that lack some.

    ``group`` are the clients whose loss decides: the unseen, if there are any. None if nothing was
    evaluated: then the training loss decides.
    """

    rows: tuple[Row, ...]
    group: str | None
    seeds: tuple[int, ...]

    @property
    def used(self) -> tuple[Row, ...]:
        """The methods that can be used with the config."""
        return tuple(row for row in self.rows if not row.refused)

    @property
    def best(self) -> Row | None:
        """The first method, if it has a loss."""
        return self.rows[0] if self.rows and self.rows[0].spread(self.loss) else None

    def loss(self, run: Measured) -> float | None:
        """The loss that decides, after the last round."""
        if self.group is None:
            return last_training(run)
        last = run.last(self.group)
        return last.loss if last else None

    def standing(self, row: Row) -> Standing | None:
        """A method against the best; None if they have no seed in common."""
        if self.best is None:
            return None
        sides = self._losses(row), self._losses(self.best)
        seeds = sorted(sides[0].keys() & sides[1].keys())
        if not seeds:
            return None
        own, best = (Spread.of([side[seed] for seed in seeds]) for side in sides)
        behind = Spread.of([a - b for a, b in zip(own.values, best.values, strict=True)])
        level = None
        if own.deviation is not None and best.deviation is not None:
            level = behind.mean <= max(own.deviation, best.deviation)
        return Standing(behind, level, all(value > 0 for value in behind.values))

    def _losses(self, row: Row) -> dict[int, float]:
        losses = {run.seed: self.loss(run) for run in row.runs}
        return {seed: loss for seed, loss in losses.items() if loss is not None}


def measured(seed: int, events: Iterable[Event]) -> Measured:
    """What the journal of the run of this seed contains."""
    events = list(events)
    training = [row for row in tables.training_table(events) if row.rank_type is None]
    scores: dict[str, dict[int, EvaluationRow]] = {}
    for row in tables.trajectory(tables.evaluation_table(events)):
        scores.setdefault(row.group, {})[row.round] = row
    energy: dict[int, dict[str, float]] = {}
    for block in tables.energy_table(events):
        energy.setdefault(block.round, {})[block.block] = block.share
    traffic, times = tables.traffic_table(events), tables.time_table(events)
    return Measured(
        seed=seed,
        facts=tables.run_facts(events),
        rank_types=tuple(tables.rank_type_table(events)),
        training={row.round: row.loss for row in training if row.loss is not None},
        scores=scores,
        energy=energy,
        bytes_up=traffic[-1].total_up if traffic else None,
        bytes_down=traffic[-1].total_down if traffic else None,
        server_seconds=sum(row.aggregation for row in times) if times else None,
        bytes_so_far={row.round: row.total_up + row.total_down for row in traffic},
        seconds=sum(row.training + row.aggregation for row in times) if times else None,
    )


def compared(outcomes: Sequence[Outcome]) -> Comparison:
    """The comparison of these runs, from the journals of the complete ones."""
    runs = _with_base(
        {
            (o.cell.name, o.cell.variant, o.cell.seed): measured(
                o.cell.seed, Record(o.cell.folder).events(*READ)
            )
            for o in outcomes
            if o.state == "finished"
        }
    )
    rows = [
        Row(
            method=name,
            runs=tuple(run for (method, *_), run in runs.items() if method == name),
            others=tuple(o for o in outcomes if o.cell.name == name and o.state != "finished"),
            kind=cell.method,
            variant=cell.variant,
            changes=cell.changes,
            own=cell.own,
        )
        for name, cell in {o.cell.name: o.cell for o in outcomes}.items()
    ]
    evaluated = {group for run in runs.values() for group in run.scores if run.last(group)}
    group = next((g for g in ("unseen", "seen") if g in evaluated), None)
    seeds = tuple(sorted({o.cell.seed for o in outcomes}))
    unordered = Comparison(tuple(rows), group, seeds)

    def place(row: Row) -> tuple[bool, bool, float, str]:
        loss = row.spread(unordered.loss)
        return loss is None, bool(row.others), loss.mean if loss else 0.0, row.method

    return replace(unordered, rows=tuple(sorted(rows, key=place)))


def text_of(value: Spread | None, digits: int, sign: str = "") -> str:
    """A mean with its standard deviation; a dash for nothing."""
    if value is None:
        return "–"
    mean = f"{value.mean:{sign}.{digits}f}"
    return mean if value.deviation is None else f"{mean} ± {value.deviation:.{digits}f}"


def score(group: str, key: str, best: bool = False) -> Value:
    """One metric on one group after the last round, or after the best."""

    def value(run: Measured) -> float | None:
        row = run.best(group) if best else run.last(group)
        measured_value: float | None = getattr(row, key) if row else None
        return measured_value

    return value


def worst_client(group: str) -> Value:
    """The loss of the worst client of a group after the last round; None of a single client."""
    loss = next(metric for metric in tables.METRICS if metric.key == "loss")

    def value(run: Measured) -> float | None:
        last = run.last(group)
        spread = tables.client_spread(last, loss) if last else None
        return spread.worst if spread else None

    return value


def sent(run: Measured) -> float | None:
    """The bytes of all rounds, up and down."""
    return run.bytes_so_far[max(run.bytes_so_far)] if run.bytes_so_far else None


def curve(group: str, key: str) -> Series:
    """One metric on one group by round, from the base model on."""
    return lambda run: {n: getattr(row, key) for n, row in run.scores.get(group, {}).items()}


def last_training(run: Measured) -> float | None:
    """The training loss of the last round."""
    return run.training[max(run.training)] if run.training else None


def highest_block(run: Measured) -> dict[int, float | None]:
    """The energy in the highest block of ranks that any client has, by round."""
    return {number: list(blocks.values())[-2] for number, blocks in run.energy.items()}


def groups_of(comparison: Comparison) -> list[str]:
    """The groups of clients that were evaluated, the one that decides first."""
    evaluated = {group for row in comparison.rows for run in row.runs for group in run.scores}
    return [group for group in ("unseen", "seen") if group in evaluated]


def blocks_of(comparison: Comparison) -> list[str]:
    """The blocks of ranks, ascending; the last one lies beyond the largest rank in use."""
    runs = [run for row in comparison.rows for run in row.runs]
    names = [name for run in runs for blocks in run.energy.values() for name in blocks]
    return sorted(dict.fromkeys(names), key=lambda name: int(name.split("–")[0].split()[0]))


def block(name: str) -> Series:
    """The energy in one block of ranks by round."""
    return lambda run: {n: blocks.get(name) for n, blocks in run.energy.items()}


Runs = dict[tuple[str, str, int], Measured]
"""By what a row is called, the variant and the seed."""


def _with_base(runs: Runs) -> Runs:
    """Each run with the base model's scores, which one run of each seed and variant contains."""
    base = {
        (variant, seed, group): row
        for (_, variant, seed), run in runs.items()
        for group in run.scores
        if (row := run.before(group))
    }
    return {
        (name, variant, seed): replace(
            run,
            scores={
                group: ({0: before} if (before := base.get((variant, seed, group))) else {})
                | dict(rows)
                for group, rows in run.scores.items()
            },
        )
        for (name, variant, seed), run in runs.items()
    }
