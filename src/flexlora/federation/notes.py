"""What a config asks for and a run does otherwise, because of its data."""

from __future__ import annotations

from flexlora.config import Experiment
from flexlora.federation.prepared import PreparedRun
from flexlora.journal import counted


def of(prepared: PreparedRun) -> tuple[str, ...]:
    """Sentences on the settings that the clients and the test rows change."""
    experiment = prepared.experiment
    return (
        *prepared.notices,
        *_of_cohort(experiment, len(prepared.clients)),
        *_of_questions(experiment, len(prepared.questions)),
    )


def _of_cohort(experiment: Experiment, clients: int) -> list[str]:
    federation, count = experiment.federation, counted(clients, "client")
    if federation.cohort is not None and federation.cohort > clients:
        trains = "trains" if clients == 1 else "train"
        return [
            f"federation.cohort is {federation.cohort}, but only {count} {trains}: "
            "every round uses all of them."
        ]
    if federation.fraction is not None and federation.fraction * clients < 1:
        return [
            f"federation.fraction is {federation.fraction:g}, of {count} less than one: every "
            "round uses one client."
        ]
    return []


def _of_questions(experiment: Experiment, questions: int) -> list[str]:
    settings = experiment.evaluation
    if questions or settings.client_share:
        return []
    if not settings.seen_clients and not settings.unseen_clients:
        reason = "evaluation.seen_clients and evaluation.unseen_clients are 0."
    else:
        reason = (
            "no evaluated client has a test row. Without a split column clients of at least five "
            "rows have one; with a split column those rows whose split is test."
        )
    return [f"Nothing is evaluated: {reason}"]
