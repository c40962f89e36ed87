"""Weights & Biases: the config and metrics by round; without an account, offline in the folder.

Unverified against the service: tested with a stand-in for the package.
"""

from __future__ import annotations

import json
import netrc
import os
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from flexlora.journal import Event
from flexlora.reporting.tracker import Tracker, require, scalars

FOLDER = "wandb"
STATE = "flexlora.json"
_SERVER = "https://api.wandb.ai"
_GROUPS = ("training", "evaluation", "clients", "bytes", "seconds", "energy")
"""The first parts of the names of metrics; each is drawn over rounds."""


class WandB(Tracker):
    """One W&B run for one run; its id and what it has are kept in the folder ``wandb``.

    WANDB_PROJECT, WANDB_MODE and the other variables of W&B are respected. If none sets the mode
    and there is no key for the server, the run is written offline and nothing is sent. W&B cannot
    delete a value: of a round that was interrupted and repeated, the first values stay.
    """

    title = "Weights & Biases"

    def __init__(self, folder: Path) -> None:
        self._folder = folder.resolve()
        self._run: Any = None
        self._id, self._finished = "", False
        self._logged: set[str] = set()

    @classmethod
    def of(cls, folder: Path) -> WandB:
        """The tracker of the run in ``folder``."""
        require(cls.title, "wandb", extra="wandb")
        return cls(folder)

    @property
    def view(self) -> str:
        """Where the run is seen, or how it is sent there."""
        if _mode() == "online":
            return f"project {_project()} on {os.environ.get('WANDB_BASE_URL', _SERVER)}"
        if _mode() != "offline":
            return ""
        return f"offline; send it with: wandb sync {self._folder / FOLDER}/offline-run-*"

    def on(self, event: Event) -> None:
        """Log the event's numbers at its round, once."""
        if event["event"] in ("start", "finish"):
            self._finished = event["event"] == "finish"
        if event["event"] == "start" and self._run is None:
            self._open(event)
        elif self._run is not None and (numbers := scalars(event)):
            key = f"{event['event']} {event['round']} {event.get('adapter', '')}".rstrip()
            if key not in self._logged:
                self._run.log({"round": event["round"], **numbers})
                self._logged.add(key)
                self._store()

    def close(self) -> None:
        """End the W&B run: as a success, or as a failure if the run was stopped."""
        if self._run is not None:
            self._run.finish(exit_code=0 if self._finished else 1)

    def _open(self, event: Event) -> None:
        # Before the import, which reads them: the terminal belongs to the run.
        os.environ.setdefault("WANDB_SILENT", "true")
        os.environ.setdefault("WANDB_CONSOLE", "off")
        import wandb

        folder = self._folder / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / STATE).exists():
            stored = json.loads((folder / STATE).read_text(encoding="utf-8"))
            self._id, self._logged = stored["id"], set(stored["logged"])
        # W&B adds the folder ``wandb`` itself.
        self._run = wandb.init(
            project=_project(),
            name=self._folder.name,
            dir=str(self._folder),
            config=event.get("config") or {},
            id=self._id or None,
            resume="allow",
            mode=_mode(),
        )
        self._id = self._run.id
        self._run.define_metric("round")
        for group in _GROUPS:
            self._run.define_metric(f"{group}/*", step_metric="round")
        self._store()

    def _store(self) -> None:
        content = {"id": self._id, "logged": sorted(self._logged)}
        (self._folder / FOLDER / STATE).write_text(json.dumps(content), encoding="utf-8")


def _project() -> str:
    return os.environ.get("WANDB_PROJECT") or "flexlora"


def _mode() -> str:
    """The mode that the environment says; else offline, unless there is a key for the server."""
    if mode := os.environ.get("WANDB_MODE"):
        return mode
    return "online" if os.environ.get("WANDB_API_KEY") or _has_login() else "offline"


def _has_login() -> bool:
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or _SERVER).hostname or ""
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
