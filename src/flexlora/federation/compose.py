"""A config's plug-ins made and put together: the method, its server optimiser, its regulariser."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flexlora import config, methods
from flexlora.config import Experiment
from flexlora.errors import ConfigError
from flexlora.method import Method, WithServerOptimizer, regularizers, server_optimizers
from flexlora.training import Training


def load(path: str | Path, changes: Sequence[str] = ()) -> Experiment:
    """The experiment in a TOML file, with its plug-ins checked; see ``config.load``.

    Raises:
        ConfigError: the file, a key, or the name or an option of a plug-in is wrong.
    """
    return _checked(config.load(Path(path), changes), str(path))


def parse(content: Mapping[str, Any], place: str) -> Experiment:
    """The experiment that a nested table describes, with its plug-ins checked.

    Raises:
        ConfigError: a key, or the name or an option of a plug-in, is wrong.
    """
    return _checked(config.parse(content, place), place)


def _checked(experiment: Experiment, place: str) -> Experiment:
    try:
        if "name" not in experiment.method:
            raise ConfigError(
                f"'method.name' is missing; it is one of {', '.join(methods.names())}."
            )
        methods.make(str(experiment.method["name"]), experiment.options())
        if experiment.server_optimizer is not None:
            server_optimizers.make(experiment.server_optimizer)
        if experiment.regularizer is not None:
            regularizers.make(experiment.regularizer)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{place}: {error}") from error
    return experiment


def composed(
    method: Mapping[str, Any],
    server_optimizer: Mapping[str, Any] | None,
    regularizer: Mapping[str, Any] | None,
    training: Training,
) -> Method:
    """The method of a config's section, within a server optimiser and a regulariser.

    Raises:
        ConfigError: they do not go together.
    """
    options = {key: value for key, value in method.items() if key != "name"}
    made = methods.make(str(method.get("name")), options)
    if server_optimizer is not None:
        made = WithServerOptimizer(made, server_optimizers.make(dict(server_optimizer)))
    if regularizer is not None:
        made = regularizers.make(dict(regularizer)).around(made, training)
    return made


def method_of(experiment: Experiment) -> Method:
    """The method that a config names, composed."""
    return composed(
        experiment.method, experiment.server_optimizer, experiment.regularizer, experiment.training
    )
