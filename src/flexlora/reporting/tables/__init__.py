"""The journal as rows: pure functions from events to frozen dataclasses.

Every mean is formed from totals: these are added first and divided once. What the journal
does not contain is None in a row, or no row; nothing is filled in.
"""

from flexlora.reporting.tables.facts import RankTypeRow, RunFacts, rank_type_table, run_facts
from flexlora.reporting.tables.rounds import (
    ClientRow,
    TimeRow,
    TrafficRow,
    TrainingRow,
    client_table,
    loss_counts,
    time_table,
    traffic_table,
    training_table,
)
from flexlora.reporting.tables.scores import (
    METRICS,
    CategoryRow,
    EvaluationRow,
    Metric,
    before_and_after,
    category_table,
    evaluation_table,
    main_metric,
    trajectory,
    truncated_table,
)
from flexlora.reporting.tables.spectra import (
    EnergyRow,
    KeptRow,
    SpectrumRow,
    energy_table,
    kept_table,
    spectrum_table,
)

__all__ = [
    "METRICS",
    "CategoryRow",
    "ClientRow",
    "EnergyRow",
    "EvaluationRow",
    "KeptRow",
    "Metric",
    "RankTypeRow",
    "RunFacts",
    "SpectrumRow",
    "TimeRow",
    "TrafficRow",
    "TrainingRow",
    "before_and_after",
    "category_table",
    "client_table",
    "energy_table",
    "evaluation_table",
    "kept_table",
    "loss_counts",
    "main_metric",
    "rank_type_table",
    "run_facts",
    "spectrum_table",
    "time_table",
    "traffic_table",
    "training_table",
    "trajectory",
    "truncated_table",
]
