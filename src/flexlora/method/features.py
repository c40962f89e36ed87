"""Refusals by feature: one sentence for all methods."""

from __future__ import annotations

from flexlora.errors import ConfigError
from flexlora.method.interface import Feature, Method


class UnsupportedFeature(ConfigError):
    """A method cannot be used, as the config needs a ``feature`` that it does not have."""

    def __init__(self, message: str, feature: Feature) -> None:
        super().__init__(message)
        self.feature = feature


def require(method: Method, feature: Feature, otherwise: str) -> None:
    """Refuse a method without a feature that the config needs.

    ``otherwise`` says what the config must be without it, as half a sentence.

    Raises:
        UnsupportedFeature: naming the method, the feature and the remedy.
    """
    if feature not in method.features:
        raise UnsupportedFeature(
            f"{method.title} does not support {feature.value}: {otherwise}, or use a method that "
            "does, such as 'flexlora'.",
            feature,
        )
