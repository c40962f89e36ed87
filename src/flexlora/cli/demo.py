"""The demonstration: mixed ranks against rank 8 everywhere, offline, in a few minutes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flexlora.config import Experiment
from flexlora.federation import compose
from flexlora.journal import Event, mean_scores
from flexlora.model import smollm2

ARMS = {
    "mixed ranks 8-64": {
        "types": {
            f"rank{rank}": {"attention": rank, "feed_forward": rank} for rank in (8, 16, 32, 64)
        },
        "distribution": {"rank8": 0.25, "rank16": 0.25, "rank32": 0.25, "rank64": 0.25},
    },
    "rank 8 everywhere": {"rank": 8},
}
"""The two federations compared: everything else is the same."""


def experiment(arm: str, folder: str, evaluate_base: bool) -> Experiment:
    """The federation of one arm: a family of procedural tasks for each client."""
    content: dict[str, Any] = {
        "seed": 3,
        "model": {"name": smollm2.NAME},
        "data": {"format": "procedural", "examples": 60, "unseen_clients": 5, "max_tokens": 256},
        "ranks": ARMS[arm],
        "method": {"name": "flexlora"},
        "training": {
            "learning_rate": 2e-3,
            "schedule": "constant",
            "batch_examples": 4,
            "max_steps": 2,
            "pack_tokens": 512,
        },
        "federation": {"rounds": 3, "cohort": 6},
        "evaluation": {
            "base": evaluate_base,
            "truncated": False,
            "seen_clients": 30,
            "unseen_clients": 5,
            "rows_per_client": 2,
            "max_new_tokens": 16,
            "max_prompt_tokens": 256,
        },
        "run": {"folder": folder},
    }
    return compose.parse(content, "the demo's config")


def scores(events: Sequence[Event], adapter: str, seen: bool) -> dict[str, float]:
    """The mean scores of one adapter's last evaluation, on the seen or the unseen clients."""
    last = [e for e in events if e["event"] == "evaluation" and e["adapter"] == adapter][-1]
    return mean_scores([row for row in last["clients"] if row["seen"] is seen])
