"""A config's plug-ins made and put together: method, server optimiser, regulariser, averager."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from flexlora import config, methods
from flexlora.config import Experiment, Plugins
from flexlora.errors import ConfigError
from flexlora.federation import corpora
from flexlora.method import (
    Averager,
    Method,
    averagers,
    regularizers,
    require_means,
    require_uploads,
    server_optimizers,
    with_server_optimizer,
)
from flexlora.storage import DamagedFile, expanded, read_sealed, write_sealed
from flexlora.training import Training

CONFIG = "config.json"
"""The settings of a run, in its folder."""

PLAIN = {"name": "plain"}
"""The averager of a config that names none."""

SECTIONS: Mapping[str, Plugins[Any]] = {
    "method": methods.PLUGINS,
    "server_optimizer": server_optimizers.PLUGINS,
    "regularizer": regularizers.PLUGINS,
    "averager": averagers.PLUGINS,
}
"""The sections of a config that describe a plug-in."""


def load(path: str | Path, changes: Sequence[str] = ()) -> Experiment:
    """The experiment in a TOML file, with its plug-ins checked; see ``config.load``.

    Raises:
        ConfigError: the file, a key, or the name or an option of a plug-in is wrong.
    """
    return _checked(config.load(Path(path), changes), str(path))


def store(experiment: Experiment, folder: Path) -> None:
    """Write an experiment into the folder of its run, for ``stored``."""
    write_sealed(folder / CONFIG, experiment.model_dump(mode="json"))


def stored(folder: Path, changes: Sequence[str] = ()) -> Experiment:
    """The experiment that the run in ``folder`` was started with, and ``changes`` to it.

    Raises:
        ConfigError: the folder holds no run, or its config is damaged or of another version.
    """
    path = folder / CONFIG
    remedy = "restore the file from a copy, or start a new run in another folder"
    try:
        content = read_sealed(path, remedy, or_plain=True)
    except FileNotFoundError as error:
        raise ConfigError(f"There is no run to resume in {folder}: it has no {CONFIG}.") from error
    except DamagedFile as error:
        raise ConfigError(str(error)) from error
    return parse(content, str(path), changes)


def parse(content: Mapping[str, Any], place: str, changes: Sequence[str] = ()) -> Experiment:
    """The experiment that a nested table describes, with its plug-ins checked.

    ``changes`` are texts ``a.b=value`` that are applied before.

    Raises:
        ConfigError: a key, or the name or an option of a plug-in, is wrong.
    """
    if not changes:
        return _checked(config.parse(content, place), place)
    changed: dict[str, Any] = copy.deepcopy(dict(content))
    places = config.apply_changes(changed, changes)
    return _checked(config.parse(changed, place, places), place)


def with_values(settings: Experiment, values: Mapping[str, Any], place: str) -> Experiment:
    """The experiment with these values by dotted key, checked like any config.

    Raises:
        ConfigError: a key or a value is wrong; ``place`` says where it was given.
    """
    if not values:
        return settings
    content = settings.model_dump(mode="json", exclude_unset=True)
    return _checked(config.parse(config.with_values(content, values), place), place)


def with_plugin(settings: Experiment, path: str | Path) -> Experiment:
    """The experiment with the plug-in in this Python file, which replaces the one of its kind.

    Options stay where the config's section names the same file.

    Raises:
        ConfigError: the file defines no plug-in, or its options do not fit.
    """
    path = expanded(path, "The plug-in").resolve()
    defined = [name for name, plugins in SECTIONS.items() if plugins.is_defined_in(path)]
    if not defined:
        raise ConfigError(
            f"{path} defines no plug-in; it needs a class derived from flexlora.Method, "
            "Regularizer, ServerOptimizer or Averager."
        )
    changed = {name: _named(getattr(settings, name), path) for name in defined}
    return _checked(settings.model_copy(update=changed), str(path))


def composed(
    method: Mapping[str, Any],
    server_optimizer: Mapping[str, Any] | None,
    regularizer: Mapping[str, Any] | None,
    training: Training,
    files: bool = True,
) -> Method:
    """The method of a config's section, within a server optimiser and a regulariser.

    Without ``files`` no section may name a Python file: see ``Plugins.kind``.

    Raises:
        ConfigError: they do not go together.
    """
    made = methods.PLUGINS.make(method, files)
    return _wrapped(made, server_optimizer, regularizer, training, files)


def composed_method(method: Method, experiment: Experiment) -> Method:
    """A method given as an object, within the config's server optimiser and regulariser."""
    return _wrapped(
        method, experiment.server_optimizer, experiment.regularizer, experiment.training
    )


def method_of(experiment: Experiment) -> Method:
    """The method that a config names, composed."""
    return composed(
        experiment.method, experiment.server_optimizer, experiment.regularizer, experiment.training
    )


def averager_for(
    method: Method, experiment: Experiment, clients: Collection[str] | None = None
) -> Averager:
    """The averager that a config names; plain averaging if it names none.

    ``clients`` are those that train, where they are known.

    Raises:
        ConfigError: it does not compute what the method needs, rounds may be too small for it, or
            a client that it needs is missing.
    """
    averager = averagers.make(experiment.averager or PLAIN)
    require_means(averager, method)
    require_uploads(averager, experiment.federation.quorum)
    if clients is not None:
        _require_clients(averager, clients)
    return averager


def _require_clients(averager: Averager, clients: Collection[str]) -> None:
    """Refuse an averager that needs clients which do not take part.

    Raises:
        ConfigError: naming them, and some that do.
    """
    if absent := sorted(averager.required - set(clients)):
        raise ConfigError(
            f"The averager {averager.title!r} needs the client {absent[0]!r}, which does not train "
            f"in this run; clients are {', '.join(map(repr, list(clients)[:5]))} and so on "
            f"({len(clients)} in all)."
        )


def _wrapped(
    method: Method,
    server_optimizer: Mapping[str, Any] | None,
    regularizer: Mapping[str, Any] | None,
    training: Training,
    files: bool = True,
) -> Method:
    if server_optimizer is not None:
        optimizer = server_optimizers.make(server_optimizer, files)
        method = with_server_optimizer(method, optimizer)
    if regularizer is not None:
        method = regularizers.make(regularizer, files).wrap(method, training)
    return method


def _named(section: Mapping[str, Any] | None, path: Path) -> dict[str, Any]:
    """A config's section for the plug-in in this file."""
    options = dict(section or {}) if section and section.get("name") == str(path) else {}
    return {**options, "name": str(path)}


def _checked(experiment: Experiment, place: str) -> Experiment:
    """The experiment with the names of its plug-ins as they are listed, all of them tried."""
    named: dict[str, dict[str, Any]] = {}
    try:
        corpora.check(experiment.data.format)
        for key, plugins in SECTIONS.items():
            section = getattr(experiment, key)
            if section is not None:
                plugins.make(section)
                named[key] = {**section, "name": plugins.resolve(str(section["name"]))}
    except ConfigError as error:
        raise ConfigError(f"{place}: {error}") from error
    return experiment.model_copy(update=named)
