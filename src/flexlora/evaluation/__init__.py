"""Evaluation of a model by the text that it generates and by its held-out loss."""

from flexlora.evaluation.held_out_loss import losses
from flexlora.evaluation.scoring import (
    Answer,
    Evaluated,
    Evaluation,
    Question,
    evaluate_each,
    evaluate_with_answers,
    pick,
    sample,
)

__all__ = [
    "Answer",
    "Evaluated",
    "Evaluation",
    "Question",
    "evaluate_each",
    "evaluate_with_answers",
    "losses",
    "pick",
    "sample",
]
