"""The app that is installed here: a node runs it and no other, whatever app its server sends.

Flower's nodes download the app of a run from the server, unpack it and import it. On a node of this
library its bytes are never used: its hash must be that of the installed app, whose own files take
its place. Each function that is replaced here is one of Flower's; if Flower no longer
has it, the node does not start.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.resources import files
from importlib.resources.abc import Traversable
from io import BytesIO
from pathlib import Path
from types import ModuleType
from typing import Any, Final
from zipfile import ZipFile

import tomli
from flwr.app import Error, Message
from flwr.cli import build
from flwr.common.config import get_metadata_from_config
from flwr.common.constant import ErrorCode
from flwr.supercore.constant import TaskType
from flwr.supercore.fab import Fab
from flwr.supercore.run import Run
from flwr.supernode import start_client_internal
from flwr.supernode.runtime import run_clientapp

from flexlora.deployment.flower.supernode import write_refusal
from flexlora.errors import ProtocolError

_CONFIG: Final = "pyproject.toml"
_HASH: Final = re.compile(r"[0-9a-f]{64}")


class Refused(Exception):
    """What the server sends is refused; the text is a sentence."""


@dataclass(frozen=True)
class InstalledApp:
    """The installed app as Flower's bundle (FAB), and what identifies it."""

    fab: Fab
    id: str
    version: str

    @classmethod
    def built(cls) -> InstalledApp:
        """The bundle of the installed files: the same bytes as a server of this version sends."""
        contents = app_files()
        content, _ = build.build_fab_from_files(contents)
        id, version = get_metadata_from_config(tomli.loads(contents[_CONFIG].decode()))
        return cls(Fab(hashlib.sha256(content).hexdigest(), content, {}), id, version)

    def has_files_of(self, bundle: bytes) -> bool:
        """Whether a bundle has the same files, compared in memory: nothing of it is used.

        Bundles of the same files differ where their machines compress differently.
        """
        try:
            with ZipFile(BytesIO(self.fab.content)) as own, ZipFile(BytesIO(bundle)) as other:
                sizes = [
                    {e.filename: e.file_size for e in each.infolist()} for each in (own, other)
                ]
                return (
                    sizes[0] == sizes[1]
                    and len(other.infolist()) == len(sizes[1])
                    and all(own.read(name) == other.read(name) for name in sizes[0])
                )
        # Whatever is wrong with a stranger's archive, it is not this app.
        except Exception:
            return False

    def of_run(self, run: Run, bundle: Callable[[], bytes]) -> Run:
        """A server's run, with this app in place of whatever the server names.

        ``bundle`` downloads the server's app, where its hash is another one.

        Raises:
            Refused: the run's app is another one, or is to run as something else than a client.
        """
        if run.fab_hash != self.fab.hash_str and not self.has_files_of(bundle()):
            named = run.fab_hash if _HASH.fullmatch(run.fab_hash) else "of no valid form"
            raise Refused(
                "The server runs another app than the one that is installed here, and this node "
                f"runs no code of a server's: the hash of its app is {named}, that of the "
                f"installed one {self.fab.hash_str}. Install the same versions of flexlora and "
                "flwr on both sides; if they are the same, do not trust this server."
            )
        if run.primary_task_type not in ("", TaskType.SERVER_APP):
            raise Refused(
                "The server asks this node to run a program of Flower's other than a client app, "
                "which it does not do; do not trust this server."
            )
        return replace(
            run,
            fab_id=self.id,
            fab_version=self.version,
            fab_hash=self.fab.hash_str,
            override_config={},
            primary_task_type=TaskType.SERVER_APP,
        )


def app_files() -> dict[str, bytes]:
    """The installed app's files by their path, without caches."""
    contents: dict[str, bytes] = {}

    def add(folder: Traversable, place: str) -> None:
        for entry in folder.iterdir():
            if entry.is_dir():
                if entry.name != "__pycache__":
                    add(entry, f"{place}{entry.name}/")
            else:
                contents[place + entry.name] = entry.read_bytes()

    add(files("flexlora.deployment.flower") / "app", "")
    return contents


def run_it_alone(app: InstalledApp, most_bytes: int, home: Path) -> None:
    """Let the SuperNode of this process run ``app`` alone, and take messages up to a size.

    A message that is refused is answered with an error; the sentence is written to ``home`` for
    ``refusal``.
    """
    name = "_pull_and_store_message"
    take = one_of_flowers(start_client_internal, name)
    insert = one_of_flowers(start_client_internal, "_insert_message")

    def taken(**flowers: Any) -> int | None:
        guard = _Guard(app, most_bytes, flowers)
        try:
            run: int | None = take(**{**flowers, **guard.replaced()})
        except Refused as error:
            run = None
            guard.refusal = str(error)
        if guard.refusal is None:
            return run
        write_refusal(home, guard.refusal)
        if guard.message is None:
            return None
        reason = Error(ErrorCode.INVALID_FAB, guard.refusal)
        insert(Message(reason, reply_to=guard.message), flowers["state"], flowers["object_store"])
        return int(guard.message.metadata.run_id)

    setattr(start_client_internal, name, taken)


class _Guard:
    """Stands between Flower's SuperNode and the server while one message is taken."""

    def __init__(self, app: InstalledApp, most_bytes: int, flowers: Mapping[str, Any]) -> None:
        self.app, self.most_bytes, self.flowers = app, most_bytes, flowers
        self.message: Any = None
        self.refusal: str | None = None
        self.bytes = 0

    def replaced(self) -> dict[str, Callable[..., Any]]:
        """Flower's functions that ask the server, by their names."""
        return {
            "receive": self.receive,
            "get_run": self.get_run,
            "get_fab": self.get_fab,
            "pull_object": self.pull_object,
        }

    def receive(self) -> Any:
        received = self.flowers["receive"]()
        if received is not None:
            self.message = received[0]
        return received

    def get_run(self, run_id: int) -> Run:
        run: Run = self.flowers["get_run"](run_id)
        return self.app.of_run(run, lambda: self.flowers["get_fab"](run.fab_hash, run_id).content)

    def get_fab(self, fab_hash: str, run_id: int) -> Fab:
        return self.app.fab

    def pull_object(self, run_id: int, object_id: str) -> bytes:
        content: bytes = self.flowers["pull_object"](run_id, object_id)
        self.bytes += len(content)
        if self.bytes > self.most_bytes:
            self.refusal = too_large(self.most_bytes)
            raise Refused(self.refusal)
        return content


def too_large(most_bytes: int) -> str:
    """The sentence on a message that is larger than the owner's limit."""
    return (
        f"The server sends a message of more than {most_bytes / 2**20:.0f} MiB, the most that this "
        "client takes; to take more, join with a larger --memory."
    )


def answer_with_it() -> None:
    """Let Flower's process of one message run the installed app: nothing is unpacked or loaded."""
    from flexlora.deployment.flower import client_app

    def nothing(*_: Any, **__: Any) -> None: ...

    def loader(*_: Any, **__: Any) -> Callable[[str, str, str], Any]:
        return lambda fab_id, fab_version, fab_hash: client_app.app

    for name, function in (
        ("install_from_fab", nothing),
        ("install_app_dependencies", nothing),
        ("get_load_client_app_fn", loader),
    ):
        one_of_flowers(run_clientapp, name)
        setattr(run_clientapp, name, function)


def one_of_flowers(module: ModuleType, name: str) -> Callable[..., Any]:
    """A function of Flower's that is to be replaced.

    Raises:
        ProtocolError: this version of Flower does not have it.
    """
    function = getattr(module, name, None)
    if not callable(function):
        raise ProtocolError(
            f"The installed version of Flower has no {module.__name__}.{name}, by which a node is "
            "kept from running a server's code; install one that flexlora supports: "
            "pip install 'flexlora[flower]'."
        )
    chosen: Callable[..., Any] = function
    return chosen
