"""A TOML file as frozen settings. Only their form is checked here."""

from flexlora.config.experiment import Experiment, Ranks, load, parse, rank_table
from flexlora.config.plugins import Plugins
from flexlora.config.ranks import PAPER_TYPES, Assignment, RankType, assign, distribution, several

__all__ = [
    "PAPER_TYPES",
    "Assignment",
    "Experiment",
    "Plugins",
    "RankType",
    "Ranks",
    "assign",
    "distribution",
    "load",
    "parse",
    "rank_table",
    "several",
]
