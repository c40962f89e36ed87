"""A TOML file as frozen settings, and back. Only the form of the settings is checked."""

from flexlora.config.comparison import ComparisonSettings, read_comparison, varied, with_values
from flexlora.config.experiment import DataSettings, Experiment, Ranks, parse
from flexlora.config.jobs import JobFile, JobSettings, load_jobs
from flexlora.config.plugins import Plugins
from flexlora.config.ranks import (
    PAPER_TYPES,
    Assignment,
    RankType,
    assign,
    distribution,
    rank_text,
    several,
)
from flexlora.config.toml import apply_changes, dump, load, rank_table

__all__ = [
    "PAPER_TYPES",
    "Assignment",
    "ComparisonSettings",
    "DataSettings",
    "Experiment",
    "JobFile",
    "JobSettings",
    "Plugins",
    "RankType",
    "Ranks",
    "apply_changes",
    "assign",
    "distribution",
    "dump",
    "load",
    "load_jobs",
    "parse",
    "rank_table",
    "rank_text",
    "read_comparison",
    "several",
    "varied",
    "with_values",
]
