"""MLflow: the config as parameters and metrics by round, on a server or in the run's folder."""

from __future__ import annotations

import logging
import os
import posixpath
import re
import time
import zlib
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from flexlora.errors import ConfigError
from flexlora.journal import Event
from flexlora.reporting.tracker import Tracker, require, scalars

FOLDER = "mlflow"
STORE = "mlflow.db"
RUN_ID = "run_id"
_MOST_PARAMS = 100
_LONGEST_PARAM = 6000
_LONGEST_KEY = 250


class MLflow(Tracker):
    """One MLflow run for one run; its id is stored in the folder ``mlflow``.

    Without MLFLOW_TRACKING_URI it is in an SQLite store beside that id. MLflow cannot delete a
    metric: of a round that was interrupted and repeated, the first values stay. Its telemetry is
    off unless MLFLOW_DISABLE_TELEMETRY is set to false.
    """

    title = "MLflow"

    def __init__(self, folder: Path) -> None:
        self._run, self._folder = folder.resolve(), folder.resolve() / FOLDER
        self._client: Any = None
        self._id, self._finished = "", False
        self._logged: set[tuple[str, int]] = set()

    @classmethod
    def of(cls, folder: Path) -> MLflow:
        """The tracker of the run in ``folder``."""
        require(cls.title, "mlflow")
        if not os.environ.get("MLFLOW_TRACKING_URI"):
            require(cls.title, "sqlalchemy", "alembic")
        return cls(folder)

    @property
    def view(self) -> str:
        """The server, or the command that opens the store in the folder."""
        if uri := os.environ.get("MLFLOW_TRACKING_URI"):
            return uri
        return f"mlflow ui --backend-store-uri sqlite:///{self._folder / STORE}"

    def on(self, event: Event) -> None:
        """Log the event's numbers, one request for all of them."""
        if event["event"] in ("start", "finish"):
            self._finished = event["event"] == "finish"
        if event["event"] == "start" and not self._id:
            self._opened(event)
        elif self._id and (numbers := scalars(event)):
            self._log(numbers, event["round"], event.get("time", time.time()))

    def close(self) -> None:
        """Set the final status: FINISHED, or KILLED if the run was stopped."""
        if self._id:
            self._client.set_terminated(self._id, "FINISHED" if self._finished else "KILLED")

    def _opened(self, event: Event) -> None:
        self._client = _client(self._folder)
        self._id = self._existing() or self._created(event)
        self._client.update_run(self._id, status="RUNNING")
        for key in self._client.get_run(self._id).data.metrics:
            history = self._client.get_metric_history(self._id, key)
            self._logged |= {(key, metric.step) for metric in history}

    def _existing(self) -> str:
        """The id of the run if it was tracked before in this store, otherwise empty."""
        from mlflow.exceptions import MlflowException

        path = self._folder / RUN_ID
        if not path.exists():
            return ""
        id = path.read_text(encoding="utf-8").strip()
        try:
            return str(self._client.get_run(id).info.run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return ""

    def _created(self, event: Event) -> str:
        """A new run with the config as its parameters."""
        from mlflow.entities import Param

        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "flexlora")
        experiment = self._client.get_experiment_by_name(name)
        id = experiment.experiment_id if experiment else self._experiment(name)
        tags = {
            "flexlora.version": str(event.get("version", "")),
            "flexlora.hardware": str(event.get("hardware", "")),
            "flexlora.folder": str(self._run),
        }
        run = self._client.create_run(id, run_name=self._run.name, tags=tags)
        run_id = str(run.info.run_id)
        (self._folder / RUN_ID).write_text(run_id, encoding="utf-8")
        params = (Param(_key(key), value) for key, value in _flat(event.get("config") or {}))
        while some := list(islice(params, _MOST_PARAMS)):
            self._client.log_batch(run_id, params=some)
        return run_id

    def _experiment(self, name: str) -> str:
        local = None if os.environ.get("MLFLOW_TRACKING_URI") else self._folder / "artifacts"
        place = local.as_uri() if local else None
        return str(self._client.create_experiment(name, artifact_location=place))

    def _log(self, numbers: Mapping[str, float], round: int, at: float) -> None:
        from mlflow.entities import Metric

        named = {_key(name): value for name, value in numbers.items()}
        new = {key: value for key, value in named.items() if (key, round) not in self._logged}
        metrics = [Metric(key, value, int(1000 * at), round) for key, value in new.items()]
        if metrics:
            self._client.log_batch(self._id, metrics=metrics)
            self._logged |= {(key, round) for key in new}


def _client(folder: Path) -> Any:
    """A client of the server that the environment names, or of the store in ``folder``."""
    # Before the import, which reads it: a private run must not be reported anywhere by default.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow import MlflowClient

    folder.mkdir(parents=True, exist_ok=True)
    # It logs many lines when it creates the tables of a new store.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder / STORE}"
    if uri.startswith("sqlite:") and "?" in uri:
        raise ConfigError(
            f"MLflow does not accept a '?' in the path of a store: {uri}; rename the folder."
        )
    return MlflowClient(tracking_uri=uri)


def _flat(table: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, str]]:
    """The values of a nested config under dotted keys, without null values."""
    for key, value in table.items():
        name = f"{path}{key}"
        if isinstance(value, Mapping):
            yield from _flat(value, f"{name}.")
        elif value is not None:
            text = str(value)
            yield name, text if len(text) <= _LONGEST_PARAM else f"{text[: _LONGEST_PARAM - 1]}…"


def _key(name: str) -> str:
    """A name that MLflow accepts; different names stay different."""
    plain = re.sub(r"[^A-Za-z0-9_\-. :/]", "_", name)[:_LONGEST_KEY]
    # It refuses names that are not normalised as paths, or lead out of their folder.
    if plain == name == posixpath.normpath(name) and not name.startswith(("/", ".")):
        return name
    mark = f"{zlib.crc32(name.encode(errors='replace')):08x}"
    return f"{re.sub('[/.]', '_', plain)[: _LONGEST_KEY - 9]}-{mark}"
