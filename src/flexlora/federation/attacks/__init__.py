"""Attack simulation: some clients malicious, several defences, and what comes of it."""

from flexlora.federation.attacks.kinds import KINDS, NONE
from flexlora.federation.attacks.settings import (
    DEFENCES,
    RANKS,
    UNDEFENDED,
    AttackSettings,
    read_settings,
    with_changes,
)
from flexlora.federation.attacks.simulation import CELLS, Cell, Outcome, Scores, plan, run

__all__ = [
    "CELLS",
    "DEFENCES",
    "KINDS",
    "NONE",
    "RANKS",
    "UNDEFENDED",
    "AttackSettings",
    "Cell",
    "Outcome",
    "Scores",
    "plan",
    "read_settings",
    "run",
    "with_changes",
]
