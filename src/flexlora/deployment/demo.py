"""The demonstration of real clients: three clients as processes of their own, with TLS.

The same federation is then simulated in this process, and the two adapters are compared.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Final

from flexlora import addresses, peft_format
from flexlora.config import Experiment, dump
from flexlora.data import Corpus
from flexlora.data.corpora import procedural
from flexlora.deployment import certificates, keys
from flexlora.deployment.flower.processes import free_port
from flexlora.deployment.keys import NODES
from flexlora.errors import ProtocolError
from flexlora.federation import compose, rounds, setup
from flexlora.journal import Event, Record
from flexlora.lowrank import Adapter, LowRankSum, norm
from flexlora.model import smollm2

RANKS: Final = {"letter_counting": 4, "spell_backward": 16, "word_sorting": 64}
"""The rank of each client; its name is that of its family of tasks."""

STEPS: Final = 2
"""Optimizer steps of a client in a round."""

_ROWS: Final = 60
_THREADS: Final = 1
"""Threads of every process: three clients share two cores, and results depend on the number."""


@dataclass(frozen=True)
class Comparison:
    """The relative difference of the real and the simulated adapter, and the costs of both.

    ``bytes`` are those of the payloads, up and down.
    """

    difference: float
    real_seconds: float
    simulated_seconds: float
    rounds_seconds: tuple[list[float], list[float]]
    turns_seconds: list[float]
    bytes: int
    adapter: Path


@dataclass(frozen=True)
class DemoSettings:
    """The clients with their ranks, steps of a client in a round, and rows of a client.

    ``port`` is the server's; ``client_port`` is the port that clients connect to, if a relay stands
    in between. 0 is any free port.
    """

    ranks: Mapping[str, int] = field(default_factory=lambda: RANKS)
    steps: int = STEPS
    rows: int = _ROWS
    port: int = 0
    client_port: int = 0


def settings(data: dict[str, Any], demo: DemoSettings) -> Experiment:
    """The config of the federation, which lists its clients with the limits of their ranks."""
    clients = len(demo.ranks)
    content: dict[str, Any] = {
        "seed": 5,
        "model": {"name": smollm2.NAME},
        "data": {"max_tokens": 192, **data},
        "ranks": {
            "types": {f"rank{r}": {"attention": r, "feed_forward": r} for r in demo.ranks.values()},
            "clients": {client: f"rank{r}" for client, r in demo.ranks.items()},
        },
        "training": {
            "learning_rate": 2e-3,
            "schedule": "constant",
            "batch_examples": 4,
            "max_steps": demo.steps,
            "pack_tokens": 512,
        },
        "federation": {"rounds": 3, "cohort": clients, "quorum": clients},
        "evaluation": {"base": False, "seen_clients": 0, "unseen_clients": 0, "truncated": False},
        "run": {"threads": _THREADS, "clients_at_once": 1},
    }
    return compose.parse(content, "the demo's config")


def show(folder: Path, demo: DemoSettings | None = None) -> Comparison:
    """Run both federations in ``folder`` and print their progress; returns the comparison.

    Raises:
        ProtocolError: the real one failed; its log has the reason.
    """
    demo = demo or DemoSettings()
    folder.mkdir(parents=True)
    rows = procedural.generate(tuple(demo.ranks), examples=demo.rows, seed=5)
    files = _files(rows, folder / "data", demo)
    text = dump(settings({"format": "remote"}, demo))
    (folder / "demo.toml").write_text(text, encoding="utf-8")
    print(f"certificates and keys: one server, {len(files)} clients")
    certificates.make_server(folder / "keys", ["localhost"])
    started = time.monotonic()
    events = _federation(folder, files, demo)
    seconds = time.monotonic() - started
    print("the same, simulated in this process")
    started = time.monotonic()
    simulated = _simulated(folder, rows, demo)
    adapters = [peft_format.read(Path(run[-1]["adapter"])).adapter for run in (events, simulated)]
    return Comparison(
        difference(*adapters),
        seconds,
        time.monotonic() - started,
        (_rounds(events), _rounds(simulated)),
        [event["seconds"] for event in events if event["event"] == "client"],
        sum(e["bytes_up"] + e["bytes_down"] for e in events if e["event"] == "round"),
        Path(events[-1]["adapter"]),
    )


def difference(one: Adapter, other: Adapter) -> float:
    """The norm of the difference of two adapters' products, relative to that of the second."""
    squared = whole = 0.0
    for module, factors in other.items():
        both = LowRankSum.of([(1.0, one[module]), (-1.0, factors)])
        squared += both.svd(0).S.square().sum().item()
        whole += norm(factors) ** 2
    return float((squared / whole) ** 0.5)


def _federation(folder: Path, files: dict[str, Path], demo: DemoSettings) -> list[Event]:
    """The journal of the real federation: a server, and the clients that join it."""
    address, run = f"127.0.0.1:{demo.port or free_port()}", folder / "served"
    client_address = f"localhost:{demo.client_port}" if demo.client_port else address
    server_keys = folder / "keys"
    (server_keys / NODES).mkdir(mode=0o700)
    serve = ["serve", str(folder / "demo.toml"), "--out", str(run)]
    serve += ["--listen", address, "--keys", str(server_keys)]
    with _flexlora(serve, folder / "server.log") as server, ExitStack() as joins:
        _wait_for(address, server)
        for client, file in files.items():
            node_keys = server_keys / client
            public = keys.make_node(node_keys, client)
            shutil.copy(server_keys / "ca.crt", node_keys)
            shutil.copy(public, server_keys / NODES)
            join = ["join", client_address, "--data", str(file), "--rank", str(demo.ranks[client])]
            join += ["--keys", str(node_keys), "--state", str(folder / f"state-{client}")]
            joins.enter_context(_flexlora(join, folder / f"{client}.log"))
        _follow(server, folder / "server.log")
    if server.returncode:
        raise ProtocolError(
            f"The demo's server ended with code {server.returncode}; see {folder / 'server.log'}."
        )
    return list(Record(run).events())


def _wait_for(address: str, server: subprocess.Popen[bytes]) -> None:
    """Wait until the server listens, or has ended: clients that connect earlier wait longer."""
    target = addresses.parse(address, "the demo", "127.0.0.1:8090")
    while server.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(target) == 0:
                return
        time.sleep(0.2)


def _follow(process: subprocess.Popen[bytes], log: Path) -> None:
    """Print a process's log until it ends."""
    with log.open(encoding="utf-8") as text:
        while process.poll() is None:
            _print_lines(text)
            time.sleep(0.3)
        _print_lines(text)


def _print_lines(text: IO[str]) -> None:
    for line in text:
        print(f"  {line.rstrip()}", flush=True)


@contextmanager
def _flexlora(arguments: Sequence[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process of the command line with its log, ended with the block."""
    threads = {name: str(_THREADS) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "flexlora", *arguments],
            stdout=out,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **threads},
        )
        try:
            yield process
        finally:
            process.terminate()
            process.wait()


def _simulated(folder: Path, rows: Corpus, demo: DemoSettings) -> list[Event]:
    ready = setup.prepare(settings({"format": "table", "path": "-"}, demo), rows)
    return list(rounds.run(ready, folder / "simulated"))


def _rounds(events: Sequence[Event]) -> list[float]:
    return [event["seconds"] for event in events if event["event"] == "round"]


def _files(rows: Corpus, folder: Path, demo: DemoSettings) -> dict[str, Path]:
    """Write each client's rows into a file of its own."""
    folder.mkdir()
    files = {client: folder / f"{client}.jsonl" for client in demo.ranks}
    for row in rows.table.to_pylist():
        with files[row.pop("client")].open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    return files
