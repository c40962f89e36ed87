"""A comparison as numbers, fit for JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from flexlora import methods
from flexlora.federation import Outcome
from flexlora.method import Feature
from flexlora.reporting.comparison.values import (
    Comparison,
    Row,
    Series,
    Spread,
    Value,
    block,
    blocks_of,
    curve,
    groups_of,
    last_training,
    score,
)
from flexlora.reporting.comparison.verdict import verdict

DIGITS = {"loss": 3, "rouge_l": 1, "exact_match": 1}
"""The metrics of an evaluation, and how many decimals are meaningful."""

COSTS: Mapping[str, Value] = {
    "bytes_up": lambda run: run.bytes_up,
    "bytes_down": lambda run: run.bytes_down,
    "seconds": lambda run: run.seconds,
    "server_seconds": lambda run: run.server_seconds,
    "lost_turns": lambda run: run.facts.lost,
    "training_loss": last_training,
}
"""The costs and the training loss of a run, as single numbers."""


def content(comparison: Comparison, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """All numbers: of every method the last and the best round, costs, and series by round."""
    best, group = comparison.best, comparison.group
    return {
        "best": best.method if best else None,
        "decided_by": f"loss on {group} clients" if group else "training loss",
        "verdict": verdict(comparison),
        "seeds": list(comparison.seeds),
        "config": outcomes[0].cell.experiment.model_dump(
            mode="json", exclude={"seed", "method", "run"}
        ),
        "methods": [_row(row, comparison, outcomes) for row in comparison.rows],
    }


def _row(row: Row, comparison: Comparison, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    kind, standing = methods.make(row.kind), comparison.standing(row)
    cells = [outcome for outcome in outcomes if outcome.cell.name == row.method]
    groups, blocks = groups_of(comparison), blocks_of(comparison)
    series: dict[str, Series] = {"training_loss": lambda run: run.training}
    series |= {f"{key} ({group})": curve(group, key) for group in groups for key in DIGITS}
    series |= {f"energy of ranks {name}": block(name) for name in blocks}
    return {
        "method": row.kind,
        "variant": row.variant,
        "changes": dict(row.changes),
        "title": kind.title,
        "paper": kind.info.paper,
        "exact": kind.info.exact,
        "mixed_ranks": Feature.MIXED_RANKS in kind.features,
        "personal": Feature.PERSONAL in kind.features,
        "section": cells[0].cell.experiment.method,
        "cells": [{"seed": o.cell.seed, "state": o.state, "reason": o.reason} for o in cells],
        "standing": asdict(standing) if standing else None,
        "last": _numbers(row, groups, best=False),
        "best": _numbers(row, groups, best=True),
        "costs": {key: _plain(row.spread(value)) for key, value in COSTS.items()},
        "by_round": {
            name: {number: _plain(spread) for number, spread in row.by_round(values).items()}
            for name, values in series.items()
        },
    }


def _numbers(row: Row, groups: Sequence[str], best: bool) -> dict[str, dict[str, Any]]:
    return {
        group: {key: _plain(row.spread(score(group, key, best))) for key in DIGITS}
        for group in groups
    }


def _plain(spread: Spread | None) -> dict[str, Any] | None:
    return asdict(spread) if spread else None
