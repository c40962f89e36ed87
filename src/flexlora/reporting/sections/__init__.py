"""The sections of a run's report, one function each, from its journal."""

from flexlora.reporting.sections.header import client_count, flat, header, outcome, rank_types
from flexlora.reporting.sections.operation import clients, cost, reproduce
from flexlora.reporting.sections.results import categories, scores
from flexlora.reporting.sections.training import learning, ranks, spectrum

__all__ = [
    "categories",
    "client_count",
    "clients",
    "cost",
    "flat",
    "header",
    "learning",
    "outcome",
    "rank_types",
    "ranks",
    "reproduce",
    "scores",
    "spectrum",
]
