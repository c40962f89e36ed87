"""A client regulariser: what keeps clients near each other while they train on their own rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from flexlora.method.interface import Method
from flexlora.training import Training


class Regularizer(ABC):
    """Something that is added to a method on its clients.

    A kind is a frozen dataclass in a file of its own under ``regularizers/``; its fields are
    its options. In the same file stands what it makes of a method.
    """

    title: ClassVar[str]
    paper: ClassVar[str]

    @abstractmethod
    def wrap(self, method: Method, training: Training) -> Method:
        """The method with the regulariser, for clients that train with these settings.

        Raises:
            ValueError: it does not fit the method or the training.
        """
