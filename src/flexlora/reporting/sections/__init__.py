"""The sections of a run's report, one function each, from its journal."""

from flexlora.reporting.sections.fairness import fairness, samples
from flexlora.reporting.sections.header import (
    client_count,
    flat,
    header,
    learning_rate,
    local_training,
    outcome,
    rank_types,
    started,
    title,
)
from flexlora.reporting.sections.operation import clients, reproduce, rounds
from flexlora.reporting.sections.results import categories, client_scores, scores
from flexlora.reporting.sections.training import learning, ranks, spectrum

__all__ = [
    "categories",
    "client_count",
    "client_scores",
    "clients",
    "fairness",
    "flat",
    "header",
    "learning",
    "learning_rate",
    "local_training",
    "outcome",
    "rank_types",
    "ranks",
    "reproduce",
    "rounds",
    "samples",
    "scores",
    "spectrum",
    "started",
    "title",
]
