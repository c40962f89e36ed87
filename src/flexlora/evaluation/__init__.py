"""What a model is measured by: the text it generates and the loss it assigns."""

from flexlora.evaluation.scoring import Evaluation, Question, evaluate_each, pick

__all__ = [
    "Evaluation",
    "Question",
    "evaluate_each",
    "pick",
]
