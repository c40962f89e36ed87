"""The journal as rows: pure functions from events to frozen dataclasses.

Every mean is formed from totals: these are added first and divided once. What the journal
does not contain is None in a row, or no row; nothing is filled in.
"""

from flexlora.reporting.tables.answers import (
    SampleRow,
    chosen_samples,
    sample_table,
)
from flexlora.reporting.tables.client_scores import (
    ClientChange,
    ClientSpread,
    client_changes,
    client_spread,
    distinguishing_metric,
)
from flexlora.reporting.tables.facts import RankTypeRow, RunFacts, rank_type_table, run_facts
from flexlora.reporting.tables.rounds import (
    ClientRow,
    RoundRow,
    TimeRow,
    TrafficRow,
    TrainingRow,
    client_table,
    loss_counts,
    round_table,
    time_table,
    traffic_table,
    training_table,
)
from flexlora.reporting.tables.scores import (
    METRICS,
    CategoryRow,
    ClientEvaluationRow,
    ClientLossRow,
    ClientScore,
    EvaluationRow,
    Metric,
    before_and_after,
    category_table,
    client_evaluation_table,
    client_loss_table,
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
from flexlora.reporting.tables.uncertainty import Interval, mean_interval

__all__ = [
    "METRICS",
    "CategoryRow",
    "ClientChange",
    "ClientEvaluationRow",
    "ClientLossRow",
    "ClientRow",
    "ClientScore",
    "ClientSpread",
    "EnergyRow",
    "EvaluationRow",
    "Interval",
    "KeptRow",
    "Metric",
    "RankTypeRow",
    "RoundRow",
    "RunFacts",
    "SampleRow",
    "SpectrumRow",
    "TimeRow",
    "TrafficRow",
    "TrainingRow",
    "before_and_after",
    "category_table",
    "chosen_samples",
    "client_changes",
    "client_evaluation_table",
    "client_loss_table",
    "client_spread",
    "client_table",
    "distinguishing_metric",
    "energy_table",
    "evaluation_table",
    "kept_table",
    "loss_counts",
    "main_metric",
    "mean_interval",
    "rank_type_table",
    "round_table",
    "run_facts",
    "sample_table",
    "spectrum_table",
    "time_table",
    "traffic_table",
    "training_table",
    "trajectory",
    "truncated_table",
]
