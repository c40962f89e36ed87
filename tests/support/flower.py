"""Flower without its processes: a grid in memory, and nodes that answer as SuperNodes would."""

import itertools
import json
import shutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from flexlora.config.experiment import Experiment
from flexlora.data.corpus import Corpus
from flexlora.deployment.flower import records
from flexlora.deployment.flower.client_app import WORKER, app
from flexlora.deployment.node.capacity import Capacity, Modules
from flexlora.deployment.node.node import Node, NodeConfig
from flexlora.deployment.node.worker_socket import Response, Worker
from flexlora.deployment.server.run_files import NODES, write_numbers
from support import models

OFFLINE = 5
"""Flower's code for a node that is not online."""

SUPERLINK = 1
"""Flower's number for itself."""

MOST_LOOKS = 400
"""So often may somebody look for nodes or answers without a message between, then a test ends."""


def identified() -> None:
    """Messages know their run; Flower sets it in processes of its own."""
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1


@dataclass
class FakeNode:
    """A SuperNode, and the worker beside it."""

    number: int
    worker: Worker
    path: Path
    online: bool = True

    def handle(self, message: Message) -> Message:
        config = {WORKER: str(self.path)}
        context = Context(1, self.number, config, RecordDict(), {})
        return app(message, context)


@dataclass
class Scripted:
    """A node without a worker: what it answers to a header and a payload is a function's."""

    number: int
    says: Callable[[Mapping[str, Any], bytes], Response]
    online: bool = True

    def handle(self, message: Message) -> Message:
        said, data = self.says(*records.opened(message.content))
        held = records.payload(data) if data else None
        return Message(records.record(said, held), reply_to=message)


@dataclass
class FakeGrid:
    """Answers messages when they are pulled, each once, all that are ready.

    ``spoil`` may change an answer, or say that it comes "later".

    As Flower's own grid it writes ids into the messages that it takes, wants a list, takes no
    message for a node it does not know and says errors in the SuperLink's name.
    """

    nodes: dict[int, FakeNode | Scripted]
    spoil: Callable[[Message, FakeNode | Scripted], Message | str | None] | None = None
    looks: int = 0
    pushed: list[Message] = field(default_factory=list)
    waiting: dict[str, Message] = field(default_factory=dict)
    ids: object = field(default_factory=lambda: (f"message-{n}" for n in itertools.count()))

    def get_node_ids(self):
        self._look()
        return [node.number for node in self.nodes.values() if node.online]

    def push_messages(self, messages):
        assert isinstance(messages, list)
        taken = []
        for message in messages:
            if message.metadata.dst_node_id not in self.nodes:
                taken.append(None)
                continue
            self.looks = 0
            id = next(self.ids)
            message.metadata.__dict__["_message_id"] = id
            self.pushed.append(message)
            self.waiting[id] = message
            taken.append(id)
            if records.opened(message.content)[0]["kind"] == "over":
                # As `flexlora join` does: it stops its node.
                self.nodes[message.metadata.dst_node_id].online = False
        return taken

    def _look(self) -> None:
        self.looks += 1
        assert self.looks < MOST_LOOKS, "the server waits for ever"

    def pull_messages(self, message_ids):
        self._look()
        found = []
        for id in [id for id in message_ids if id in self.waiting]:
            message = self.waiting[id]
            answer = self._answered(message, self.nodes[message.metadata.dst_node_id])
            if answer is not None:
                del self.waiting[id]
                found.append(answer)
        self.looks = 0 if found else self.looks
        return found

    def _answered(self, message: Message, node: FakeNode | Scripted) -> Message | None:
        """The answer to a message; None if it is not there yet."""
        changed = None if self.spoil is None else self.spoil(message, node)
        if changed == "later":
            return None
        if changed is not None:
            return changed
        if not node.online:
            return failed(message, OFFLINE, "Node Unavailable")
        return node.handle(message)

    def asked(self, kind: str, **fields) -> list[int]:
        """The nodes to which such messages were sent."""
        found = []
        for message in self.pushed:
            header, _ = records.opened(message.content)
            if header["kind"] == kind and all(header[k] == v for k, v in fields.items()):
                found.append(message.metadata.dst_node_id)
        return found


def failed(message: Message, code: int, reason: str) -> Message:
    """An error about a message as the SuperLink makes it: in its own name."""
    made = Message(Error(code, reason), reply_to=message)
    made.metadata.__dict__["_src_node_id"] = SUPERLINK
    return made


def let_in(folder: Path, nodes: Mapping[str, int]) -> None:
    """Write down under which names the nodes' keys were let in, as the server does."""
    folder.mkdir(parents=True, exist_ok=True)
    write_numbers(folder, NODES, dict(nodes))


def data_of(corpus: Corpus, folder: Path) -> dict[str, Path]:
    """Each client's rows in a file of its own, as its owner has them."""
    files = {client: folder / f"{client}.jsonl" for client in set(corpus.keys("client"))}
    for row in corpus.table.to_pylist():
        with files[row.pop("client")].open("a") as file:
            file.write(json.dumps(row) + "\n")
    return files


def start(
    folder: Path,
    sockets: Path,
    ranks: dict[str, int],
    modules: Mapping[str, Modules] = MappingProxyType({}),
) -> FakeGrid:
    """A grid with a node for each client of these ranks, who may train some modules alone."""
    folder.mkdir(parents=True)
    files = data_of(models.corpus(), folder)
    nodes = {}
    for number, (client, rank) in enumerate(ranks.items(), start=2**63 + 7):
        owner = owner_of(client, rank, files[client], folder)
        owner = replace(owner, capacity=Capacity(rank, modules=modules.get(client, "all")))
        nodes[number] = beside(number, Node(owner).handle, sockets / f"{client}.sock")
    return FakeGrid(nodes)


def owner_of(client: str, rank: int, data: Path, folder: Path) -> NodeConfig:
    """An owner whose model lies beside the folder of its state."""
    model = str(folder.parent / "model")
    return NodeConfig(client, data, folder / f"state-{client}", Capacity(rank), model=model)


def beside(number: int, answer: Callable[[Mapping[str, Any], bytes], Response], path: Path):
    """A node with a worker that listens beside it."""
    worker = Worker(path, answer)
    threading.Thread(target=worker.serve, daemon=True).start()
    return FakeNode(number, worker, path)


def stop(grid: FakeGrid) -> None:
    for node in grid.nodes.values():
        if isinstance(node, FakeNode):
            node.worker.close()


def settings(folder: Path, ranks: dict[str, int], **changes) -> Experiment:
    """The same federation for a simulation and for real clients: ranks by name."""
    types = {f"r{r}": {"attention": r, "feed_forward": r} for r in ranks.values()}
    named = {id: f"r{r}" for id, r in ranks.items()}
    shape = {"types": types, "clients": named, "distribution": None, "rank": None}
    quiet = {"seen_clients": 0, "unseen_clients": 0, "truncated": False, "base": False}
    return models.settings(folder, **{"ranks": shape, "evaluation": quiet, **changes})


def fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    return folder
