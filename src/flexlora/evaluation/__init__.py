"""Evaluation of a model by the text that it generates and by its held-out loss."""

from flexlora.evaluation.scoring import Evaluation, Question, evaluate_each, pick

__all__ = [
    "Evaluation",
    "Question",
    "evaluate_each",
    "pick",
]
