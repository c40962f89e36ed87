"""What a config asks for and a run does otherwise, as sentences for its beginning."""

from __future__ import annotations

from flexlora.federation.prepared import PreparedRun
from flexlora.journal import counted


def notes(prepared: PreparedRun) -> list[str]:
    """A sentence for each setting that the data changes: the size of a cohort, the evaluation."""
    federation = prepared.experiment.federation
    clients, found = len(prepared.clients), []
    if federation.cohort is not None and federation.cohort > clients:
        found.append(
            f"federation.cohort is {federation.cohort}, but only {counted(clients, 'client')} "
            f"train: every round uses all of them"
        )
    if federation.fraction is not None and federation.fraction * clients < 1:
        found.append(
            f"federation.fraction is {federation.fraction:g} of {counted(clients, 'client')}, "
            f"less than one client: every round uses one"
        )
    if not prepared.questions:
        found.append(f"nothing is evaluated: {_why_no_questions(prepared)}")
    return found


def _why_no_questions(prepared: PreparedRun) -> str:
    settings = prepared.experiment.evaluation
    if not settings.seen_clients and not settings.unseen_clients:
        return "evaluation.seen_clients and evaluation.unseen_clients are 0"
    return (
        "no evaluated client has a test row. Without a split column only clients of at least five "
        "rows have one; a split column needs rows that it calls test"
    )
