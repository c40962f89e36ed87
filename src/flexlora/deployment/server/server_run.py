"""The server's side of a run of real clients, whatever carries the messages."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch

from flexlora.config import Experiment
from flexlora.deployment import run_spec
from flexlora.deployment.server.registry import NODES as NODES
from flexlora.deployment.server.registry import ClientRegistry, RankLimits
from flexlora.errors import ProtocolError
from flexlora.federation import Transport, checkpoint, compose, rounds, served
from flexlora.journal import Record
from flexlora.method import Feature, mixed_modules, require
from flexlora.storage.files import write_atomically

PLAN = "serve.json"
CONFIG = "config.json"
ALIVE = "serverapp.pid"
NUMBERS = "node_keys.json"
"""The carrier's number of every key that was ever let in, by its fingerprint."""


@dataclass(frozen=True)
class Plan:
    """What is decided once for a run: its name, how many clients it waits for, keys or none."""

    run: str
    clients: int
    bound: bool

    @classmethod
    def new(cls, clients: int, bound: bool) -> Plan:
        """A plan for a run that nobody else has."""
        return cls(secrets.token_hex(16), clients, bound)


class Gathering(Transport, Protocol):
    """A federation whose clients come one by one."""

    def gather(self, clients: int) -> None:
        """Wait until so many clients have come."""
        ...


class Registry(Protocol):
    """Where a carrier knows nodes by their public keys."""

    def number(self, public_key: Path, name: str, known: Collection[int]) -> int:
        """The carrier's number for a node that is let in, none of those ``known``."""
        ...

    def unregister(self, node: int) -> None:
        """End a node's right to take part; nothing happens if it has none."""
        ...


@dataclass(frozen=True)
class Nodes:
    """The nodes of the run in ``folder``: those whose public keys lie in ``keys``, no others.

    They are known to the ``registry`` and written into the run's folder.
    """

    folder: Path
    keys: Path
    registry: Registry

    def look(self) -> list[str]:
        """Let in whose keys have come, put out whose keys have gone or changed; a line on each.

        Parses every key, some 0.2 ms each.

        Raises:
            ProtocolError: a key is none, or the carrier refuses; what was done until then stays.
        """
        from flexlora.deployment.keys import fingerprint, node_keys

        found = {name: (fingerprint(p), p) for name, p in node_keys(self.keys).items()}
        inside, numbers = self._read(NODES), self._read(NUMBERS)
        lines = []
        for name, node in list(inside.items()):
            if name in found and node not in numbers.values():
                # The last server was killed before it wrote down the key as well.
                self._write(NUMBERS, numbers, found[name][0], node)
            if name in found and numbers.get(found[name][0]) == node:
                continue
            self.registry.unregister(node)
            self._write(NODES, inside, name, None)
            why = "has another key" if name in found else "has no key here any more"
            lines.append(f"node {name} is put out: it {why}")
        for name in sorted(found.keys() - inside.keys()):
            print_, path = found[name]
            if print_ in numbers:
                lines.append(
                    f"node {name} is not let in: its key {print_} was let in before and put out, "
                    f"and no key comes back in one run; make a new one: flexlora keys DIR --node "
                    f"{name}"
                )
                continue
            node = self.registry.number(path, name, {*numbers.values(), *inside.values()})
            self._write(NODES, inside, name, node)
            self._write(NUMBERS, numbers, print_, node)
            lines.append(f"node {name} may join")
        return lines

    def _read(self, name: str) -> dict[str, int]:
        file = self.folder / name
        found: dict[str, int] = (
            json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        )
        return found

    def _write(self, name: str, held: dict[str, int], key: str, node: int | None) -> None:
        """Change one entry, or with None remove it, here and on the disk."""
        held.pop(key, None)
        if node is not None:
            held[key] = node
        write_atomically(self.folder / name, json.dumps(held, indent=1).encode())


def lay_out(folder: Path, settings: Experiment, plan: Plan) -> None:
    """Write what ``host`` needs into the run's folder.

    Raises:
        ProtocolError: the config cannot be served.
    """
    check(settings)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / CONFIG, settings.model_dump_json(indent=1).encode())
    write_atomically(folder / PLAN, json.dumps(asdict(plan)).encode())


def check(settings: Experiment) -> None:
    """Refuse a config that only a simulation can run.

    Raises:
        ProtocolError: with the remedy.
    """
    limit, method = RankLimits.of(settings.ranks), compose.method_of(settings)
    if limit.several:
        require(
            method,
            Feature.MIXED_RANKS,
            "it needs one rank for all clients, but ranks.clients and ranks.rank name several; "
            "name one",
        )
    if not limit.whole:
        mixed_modules(method)  # which may refuse
    how = settings.evaluation
    if Feature.PERSONAL in method.features and (how.seen_clients or how.unseen_clients):
        raise ProtocolError(
            "This method's models are the clients' own and stay with them, so the server cannot "
            "evaluate them: set evaluation.seen_clients = 0 and evaluation.unseen_clients = 0."
        )


def has_begun(folder: Path) -> bool:
    """Whether the run's process on the server has begun, or has been and is no more."""
    return (folder / ALIVE).exists()


def is_alive(folder: Path) -> bool:
    """Whether the run's process on the server lives, or has not begun yet."""
    try:
        with (folder / ALIVE).open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (FileNotFoundError, BlockingIOError):
        return True
    return False


def forget(folder: Path) -> None:
    """Forget a process that ran before, before a new one begins."""
    (folder / ALIVE).unlink(missing_ok=True)


@contextmanager
def _living(folder: Path) -> Iterator[None]:
    """Hold a lock that falls with this process, however it ends; its number is in the file."""
    draft = folder / f".{ALIVE}.partial"
    with draft.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(str(os.getpid()))
        file.flush()
        draft.replace(folder / ALIVE)  # locked before anybody sees it
        yield


def host(folder: Path, connect: Callable[[ClientRegistry, str, int], Gathering]) -> None:
    """Run the federation of a folder, or go on with it; the journal tells of it.

    ``connect`` makes the federation, of the roll, the terms for nodes and the quorum.
    """
    with _living(folder):
        try:
            _host(folder, connect)
        except Exception as error:
            Record(folder).append("stopped", reason=f"{type(error).__name__}: {error}")
            raise


def _host(folder: Path, connect: Callable[[ClientRegistry, str, int], Gathering]) -> None:
    settings = compose.parse(json.loads((folder / CONFIG).read_text()), str(folder / CONFIG))
    plan = Plan(**json.loads((folder / PLAN).read_text()))
    torch.set_num_threads(settings.run.threads or torch.get_num_threads())
    base = settings.model.load()
    modules = list(base.shapes)
    limit = RankLimits.of(settings.ranks)
    method = compose.method_of(settings)
    alike = Feature.MIXED_RANKS not in method.features
    whole = Feature.PER_MODULE not in method.features
    most = settings.federation.most_examples
    roll = ClientRegistry(folder, limit, modules, plan.bound, alike, whole, most)
    largest = limit.largest()
    told = run_spec.of(settings, plan.run, asdict(largest)).model_dump_json()
    federation = connect(roll, told, settings.federation.quorum)
    resume = (folder / checkpoint.POINTER).exists()
    federation.gather(settings.federation.quorum if resume else plan.clients)
    ready = served.served(settings, base, roll, largest.by_module(modules))
    for _ in rounds.run(ready, folder, federation, resume=resume):
        pass
