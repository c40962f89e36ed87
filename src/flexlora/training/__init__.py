"""Local training: the optimiser and the loop."""

from flexlora.training.concurrency import bytes_to_train, clients_at_once, free_bytes
from flexlora.training.loop import ClientTask, EachStep, Trained, label_losses, train_together
from flexlora.training.optimizer import Training

__all__ = [
    "ClientTask",
    "EachStep",
    "Trained",
    "Training",
    "bytes_to_train",
    "clients_at_once",
    "free_bytes",
    "label_losses",
    "train_together",
]
