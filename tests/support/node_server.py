"""As much of a server as a client's machine sees, and an owner's choices."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

from flexlora import wire
from flexlora.config.experiment import Experiment
from flexlora.deployment import run_spec
from flexlora.deployment.node.capacity import Capacity
from flexlora.deployment.node.node import Node, NodeConfig
from flexlora.method.averagers.plain import Plain
from flexlora.method.interface import Client, Feature, FreshAdapters, RoundContext, Upload
from support import models

RUN = "0123456789abcdef"
LIMIT = {"attention": 5, "feed_forward": 5}
RANK = 3
NAME = "client2"


def own_file(folder: Path) -> None:
    """The client's rows, in a file."""
    rows = [row for row in models.corpus().table.to_pylist() if row["client"] == NAME]
    (folder / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def owner(folder: Path, state: Path, **changes) -> NodeConfig:
    usual = {"capacity": Capacity(RANK), "model": str(folder / "model")}
    return NodeConfig(NAME, folder / "mine.jsonl", state, **{**usual, **changes})


def settings(folder: Path, method: str = "flexlora", **changes) -> Experiment:
    return models.settings(folder, method={"name": method}, **changes)


@dataclass
class Server:
    """As much of a server as a node sees: it hands out, and aggregates what comes back."""

    folder: Path
    settings: Experiment
    run: str = RUN

    def __post_init__(self) -> None:
        agreed = run_spec.of(self.settings, self.run, LIMIT)
        self.told, self.method = agreed.model_dump_json(), agreed.composed()
        self.dtype = agreed.dtype
        self.shapes = self.settings.model.load().shapes
        self.ranks = dict.fromkeys(self.shapes, RANK)
        self.client = Client(NAME, self.ranks, f"r{RANK}", 10)
        fresh = FreshAdapters(self.shapes, self.settings.seed).common(self.ranks)
        self.state = self.method.start(fresh, self.context(0))

    def enrolled(self, at: Node) -> dict:
        said, data = at.handle({"kind": "enrol", "terms": self.told}, b"")
        assert data == b""
        return said

    def context(self, number: int) -> RoundContext:
        return RoundContext(number, self.settings.seed, self.shapes, self.ranks)

    def download(self, number: int) -> bytes:
        download = self.method.handout(self.state, self.client, self.context(number))
        download = replace(download, base_rounds=self.state.merge_log.merged(NAME))
        sparse = Feature.SPARSE_MESSAGES in self.method.features
        return wire.encode_download(download, self.dtype, sparse)

    def header(self, number: int, **changes) -> dict:
        return {"kind": "turn", "terms": self.told, "client": NAME, "round": number, **changes}

    def turn(self, at: Node, number: int) -> bytes:
        """An upload, absorbed into the server's state."""
        said, data = at.handle(self.header(number), self.download(number))
        assert said == {"round": number}, said
        context = self.context(number)
        cohort = Plain().cohort([self.opened(data)], self.method.weights, context)
        self.state = self.method.aggregate(self.state, cohort, context)
        return data

    def turn_again(self, at: Node, number: int) -> bytes:
        """As ``turn``, once a client has said that it lost what it had merged."""
        self.state = replace(self.state, merge_log=self.state.merge_log.forget(NAME))
        return self.turn(at, number)

    def opened(self, data: bytes) -> Upload:
        # Each has a file of its own: its tensors are read when they are asked for.
        path = self.folder / f"upload-{len(list(self.folder.glob('upload-*')))}"
        path.write_bytes(data)
        return wire.open_upload(path)
