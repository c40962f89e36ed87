"""Flower without its processes: a grid in memory, and nodes that answer as SuperNodes would."""

import itertools
import json
import shutil
import threading
from dataclasses import dataclass, field
from pathlib import Path

from flwr.app import Context, Error, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

import tiny
from flexlora.budget import Budget
from flexlora.config import Experiment
from flexlora.data.corpus import Corpus
from flexlora.federations.flower.client_app import WORKER, app
from flexlora.node import Node, Owner
from flexlora.worker import Worker

OFFLINE = 5
"""Flower's code for a node that is not online."""


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
class FakeGrid:
    """Answers messages when they are pulled, each once; ``spoil`` may change an answer.

    As Flower's own grid it writes ids into the messages that it takes, wants a list, takes no
    message for a node it does not know and says errors in the SuperLink's name.
    """

    nodes: dict[int, FakeNode]
    spoil: object = None
    pushed: list[Message] = field(default_factory=list)
    waiting: dict[str, Message] = field(default_factory=dict)
    ids: object = field(default_factory=lambda: (f"message-{n}" for n in itertools.count()))

    def get_node_ids(self):
        return [node.number for node in self.nodes.values() if node.online]

    def push_messages(self, messages):
        assert isinstance(messages, list)
        taken = []
        for message in messages:
            if message.metadata.dst_node_id not in self.nodes:
                taken.append(None)
                continue
            id = next(self.ids)
            message.metadata.__dict__["_message_id"] = id
            self.pushed.append(message)
            self.waiting[id] = message
            taken.append(id)
        return taken

    def pull_messages(self, message_ids):
        asked = [id for id in message_ids if id in self.waiting]
        if not asked:
            return []
        message = self.waiting[asked[0]]
        node = self.nodes[message.metadata.dst_node_id]
        if self.spoil is not None:
            changed = self.spoil(message, node)
            if changed == "later":
                return []
            if changed is not None:
                del self.waiting[asked[0]]
                return [changed]
        del self.waiting[asked[0]]
        if not node.online:
            return [Message(Error(OFFLINE, "Node Unavailable"), reply_to=message)]
        return [node.handle(message)]


def data_of(corpus: Corpus, folder: Path) -> dict[str, Path]:
    """Each client's rows in a file of its own, as its owner has them."""
    files = {client: folder / f"{client}.jsonl" for client in set(corpus.keys("client"))}
    for row in corpus.table.to_pylist():
        with files[row.pop("client")].open("a") as file:
            file.write(json.dumps(row) + "\n")
    return files


def start(folder: Path, sockets: Path, ranks: dict[str, int]) -> FakeGrid:
    """A grid with a node for each client of these ranks."""
    folder.mkdir(parents=True)
    files = data_of(tiny.corpus(), folder)
    nodes = {}
    for number, (client, rank) in enumerate(ranks.items(), start=2**63 + 7):
        owner = Owner(client, files[client], folder / f"state-{client}", Budget(rank))
        owner = Owner(**{**vars(owner), "model": str(folder.parent / "model")})
        path = sockets / f"{client}.sock"
        worker = Worker(path, Node(owner).answer)
        threading.Thread(target=worker.serve, daemon=True).start()
        nodes[number] = FakeNode(number, worker, path)
    return FakeGrid(nodes)


def stop(grid: FakeGrid) -> None:
    for node in grid.nodes.values():
        node.worker.close()


def settings(folder: Path, ranks: dict[str, int], **changes) -> Experiment:
    """The same federation for a simulation and for real clients: ranks by name."""
    types = {f"r{r}": {"attention": r, "feed_forward": r} for r in ranks.values()}
    named = {id: f"r{r}" for id, r in ranks.items()}
    shape = {"types": types, "clients": named, "distribution": None, "rank": None}
    quiet = {"seen_clients": 0, "unseen_clients": 0, "truncated": False, "base": False}
    return tiny.settings(folder, **{"ranks": shape, "evaluation": quiet, **changes})


def fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    return folder
