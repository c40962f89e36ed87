"""Refusals by feature: one sentence for all methods."""

from __future__ import annotations

from flexlora.errors import ConfigError
from flexlora.method.interface import Feature, Method


def require(method: Method, feature: Feature, otherwise: str) -> None:
    """Refuse a method without a feature that the config needs.

    ``otherwise`` says what the config must be without it, as half a sentence.

    Raises:
        ConfigError: naming the method, the feature and the remedy.
    """
    if feature not in method.features:
        raise ConfigError(
            f"{method.title} does not support {feature.value}: {otherwise}, or use a method that "
            "does, such as 'flexlora'."
        )
