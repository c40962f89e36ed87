"""Invented journals, as real as need be: learning that saturates, spectra that decay."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flexlora.journal.record import Event, Record
from flexlora.seeds import rng

LEVELS = [8, 30, 200]
TYPES = {"type1": 7_500_000, "type2": 28_100_000, "type3": 61_300_000, "type4": 187_000_000}
MODULES = [f"model.layers.{i}.{part}" for i in range(3) for part in ("attn.q_proj", "mlp.up")]
KINDS = (
    "question_answering",
    "summarization",
    "textual_entailment",
    "named_entity_extraction",
)


def journal(clients: int = 12, rounds: int = 6, categories: int = 40, seed: int = 5) -> list[Event]:
    """The events of a whole run, with one lost turn in every third round."""
    draw = rng(seed, "journal")
    names = [f"client-{i}" for i in range(clients)]
    types = draw.choice(list(TYPES), size=clients, p=[0.5, 0.25, 0.15, 0.1])
    events = [_start(names, list(types), seed), *_evaluations(0, categories, draw)]
    for round_ in range(1, rounds + 1):
        events += _round(round_, names, list(types), draw)
        events.append(_spectrum(round_, draw))
        events += _evaluations(round_, categories, draw)
    events.append(
        {"event": "finish", "rounds": rounds, "seconds": 4123.7, "adapter": "runs/a/adapter"}
    )
    return events


def _start(names: list[str], types: list[str], seed: int) -> Event:
    return {
        "event": "start",
        "version": "0.1.0",
        "config": {
            "seed": seed,
            "federation": {"rounds": 6},
            "model": {"name": "tiny/llama-135m", "dtype": "float32", "revision": None},
            "method": {"name": "flexlora", "split": "us"},
            "data": {"corpus": "natural_instructions", "longest_tokens": 512},
        },
        "hardware": {"device": "NVIDIA H100", "cpus": 16, "memory_gib": 128},
        "versions": {"torch": "2.9.0", "transformers": "5.0.1"},
        "clients": len(names),
        "unseen_clients": 14,
        "modules": MODULES,
        "rank_types": {name: types.count(name) for name in TYPES},
        "trainable": TYPES,
        "resumed": False,
    }


def _round(
    round_: int, names: list[str], types: list[str], draw: np.random.Generator
) -> list[Event]:
    cohort = sorted(draw.choice(len(names), size=max(3, len(names) // 2), replace=False))
    turns: list[Event] = []
    lost = [cohort.pop()] if round_ % 3 == 0 else []
    for i in cohort:
        tokens = int(draw.integers(9_000, 30_000))
        level = 1.1 + 1.6 * np.exp(-round_ / 2.5) + 0.1 * draw.normal()
        size = int(4 * TYPES[types[i]])
        turns.append(
            {
                "event": "client",
                "round": round_,
                "client": names[i],
                "rank_type": types[i],
                "examples": int(draw.integers(90, 290)),
                "tokens": tokens,
                "steps": 31,
                "loss_total": tokens * level,
                "loss_tokens": tokens,
                "seconds": float(draw.uniform(20, 60)),
                "bytes_up": size,
                "bytes_down": size if round_ > 1 else 0,
            }
        )
    sums = ("examples", "tokens", "loss_total", "loss_tokens", "bytes_up", "bytes_down")
    whole: Event = {key: sum(t[key] for t in turns) for key in sums}
    seconds = sum(t["seconds"] for t in turns)
    whole |= {"event": "round", "round": round_, "cohort": len(cohort) + len(lost)}
    whole |= {"received": len(cohort), "seconds": seconds + 48.3, "aggregate_seconds": 47.1}
    lost_event: Event = {"event": "lost", "round": round_, "kind": "no_answer"}
    gone: list[Event] = [
        {**lost_event, "client": names[i], "reason": "It did not answer within 90 s."} for i in lost
    ]
    return [*turns, *gone, {**whole, "update_norm": 3.7 / round_}]


def _spectrum(round_: int, draw: np.random.Generator) -> Event:
    energy, values = {}, {}
    for module in MODULES:
        decay = draw.uniform(6, 20) * (1 + 0.2 / round_)
        sigma = 2.0 * np.exp(-np.arange(260) / decay) + 1e-3 * np.exp(-np.arange(260) / 90)
        square = sigma**2 / (sigma**2).sum()
        energy[module] = [float(part.sum()) for part in np.split(square, LEVELS)]
        if module.startswith("model.layers.1."):
            values[module] = (sigma * (0.5 + 0.1 * round_)).tolist()
    return {
        "event": "spectrum",
        "round": round_,
        "rank_levels": LEVELS,
        "energy": energy,
        "values": values,
    }


def _evaluations(round_: int, categories: int, draw: np.random.Generator) -> list[Event]:
    last = round_ == 6
    adapters = ["base"] if round_ == 0 else ["global", *(TYPES if last else [])]
    return [
        {
            "event": "evaluation",
            "round": round_,
            "adapter": adapter,
            "seconds": 31.5,
            "clients": [
                _scored(i, i % 3 > 0, round_, 0.02 * place, draw) for i in range(categories)
            ],
        }
        for place, adapter in enumerate(adapters)
    ]


def _scored(
    i: int, seen: bool, round_: int, worse: float, draw: np.random.Generator
) -> dict[str, Any]:
    examples, tokens = 11 + i % 7, 230 + 13 * i
    share = 0.15 + (0.4 if seen else 0.3) * (1 - np.exp(-round_ / 2)) * (0.4 + (i % 5) / 4)
    share = float(np.clip(share - worse + 0.05 * draw.normal(), 0.01, 0.99))
    level = 2.9 - (1.4 if seen else 1.1) * (1 - np.exp(-round_ / 2)) + worse
    return {
        "client": f"task-{i}",
        "category": f"task{100 + i}_{KINDS[i % len(KINDS)]}_of_{i}",
        "seen": seen,
        "examples": examples,
        "rouge_l": examples * share,
        "exact_match": 0.5 * examples * share,
        "loss_total": tokens * level,
        "loss_tokens": tokens,
    }


@pytest.fixture
def make_journal() -> Callable[..., list[Event]]:
    return journal


@pytest.fixture
def write_journal(tmp_path: Path) -> Callable[[list[Event]], Path]:
    """Writes events as the journal of a run and gives its folder."""

    def written(events: list[Event]) -> Path:
        record = Record(tmp_path)
        for event in events:
            fields = dict(event)
            record.append(fields.pop("event"), **fields)
        return tmp_path

    return written
