"""The demonstration of real clients: three data owners as processes of their own, with TLS.

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

from flexlora import peft_format
from flexlora.config import Experiment
from flexlora.data import Corpus
from flexlora.data.corpora import procedural
from flexlora.deployment import keys
from flexlora.deployment.flower.superlink import free_port
from flexlora.deployment.server.supervisor import NODES
from flexlora.errors import ProtocolError
from flexlora.federation import compose, rounds, setup
from flexlora.journal import Event, Record
from flexlora.lowrank import Adapter, LowRankSum, norm
from flexlora.model import smollm2

RANKS: Final = {"letter_counting": 4, "spell_backward": 16, "word_sorting": 64}
"""The clients, each with a family of tasks, and the rank that its machine is given."""

STEPS: Final = 2
"""Of a turn."""

_ROWS: Final = 60
_THREADS: Final = 1
"""Of every process: three clients share two cores, and other numbers of threads round otherwise."""


@dataclass(frozen=True)
class Compared:
    """How far the real federation's adapter is from the simulated one, and what each took.

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
class Plan:
    """The clients with their ranks, how many steps a turn has, and rows a client.

    ``port`` is the server's, and ``reached`` the one at which clients find it: that of a relay
    in between, where it is another; 0 is any that is free.
    """

    ranks: Mapping[str, int] = field(default_factory=lambda: RANKS)
    steps: int = STEPS
    rows: int = _ROWS
    port: int = 0
    reached: int = 0


def settings(data: dict[str, Any], plan: Plan) -> Experiment:
    """The federation, whose clients are named and limited in their ranks."""
    everybody = len(plan.ranks)
    content: dict[str, Any] = {
        "seed": 5,
        "model": {"name": smollm2.NAME},
        "data": {"max_tokens": 192, **data},
        "ranks": {
            "types": {f"rank{r}": {"attention": r, "feed_forward": r} for r in plan.ranks.values()},
            "clients": {client: f"rank{r}" for client, r in plan.ranks.items()},
        },
        "training": {
            "learning_rate": 2e-3,
            "schedule": "constant",
            "batch_examples": 4,
            "max_steps": plan.steps,
            "pack_tokens": 512,
        },
        "federation": {"rounds": 3, "cohort": everybody, "quorum": everybody},
        "evaluation": {"base": False, "seen_clients": 0, "unseen_clients": 0, "truncated": False},
        "run": {"threads": _THREADS, "clients_at_once": 1},
    }
    return compose.parse(content, "the demo's config")


def show(folder: Path, plan: Plan | None = None) -> Compared:
    """Run both federations in ``folder``, saying what happens; how far they are apart.

    Raises:
        ProtocolError: the real one failed; its log says why.
    """
    plan = plan or Plan()
    folder.mkdir(parents=True)
    rows = procedural.generate(tuple(plan.ranks), examples=plan.rows, seed=5)
    files = _files(rows, folder / "data", plan)
    text = settings({"format": "remote"}, plan).model_dump_json(exclude_none=True)
    (folder / "demo.toml").write_text(_toml(json.loads(text)), encoding="utf-8")
    print(f"certificates and keys: one server, {len(files)} clients")
    keys.make_server(folder / "keys", ["localhost"])
    started = time.monotonic()
    events = _federation(folder, files, plan)
    seconds = time.monotonic() - started
    print("the same, simulated in this process")
    started = time.monotonic()
    simulated = _simulated(folder, rows, plan)
    adapters = [
        peft_format.read(Path(found[-1]["adapter"])).adapter for found in (events, simulated)
    ]
    return Compared(
        difference(*adapters),
        seconds,
        time.monotonic() - started,
        (_rounds(events), _rounds(simulated)),
        [event["seconds"] for event in events if event["event"] == "client"],
        sum(e["bytes_up"] + e["bytes_down"] for e in events if e["event"] == "round"),
        Path(events[-1]["adapter"]),
    )


def difference(one: Adapter, other: Adapter) -> float:
    """The norm of the difference of two adapters' products over that of the second."""
    apart = whole = 0.0
    for module, factors in other.items():
        both = LowRankSum.of([(1.0, one[module]), (-1.0, factors)])
        apart += both.svd(0).S.square().sum().item()
        whole += norm(factors) ** 2
    return float((apart / whole) ** 0.5)


def _federation(folder: Path, files: dict[str, Path], plan: Plan) -> list[Event]:
    """The real one: a server, and the clients that join it; its journal."""
    address, run = f"127.0.0.1:{plan.port or free_port()}", folder / "served"
    reached = f"localhost:{plan.reached}" if plan.reached else address
    held = folder / "keys"
    (held / NODES).mkdir(mode=0o700)
    serve = ["serve", str(folder / "demo.toml"), "--folder", str(run)]
    serve += ["--listen", address, "--keys", str(held)]
    with _flexlora(serve, folder / "server.log") as server, ExitStack() as joins:
        _wait_for(address, server)
        for client, file in files.items():
            place = held / client
            public = keys.make_node(place, client)
            shutil.copy(held / "ca.crt", place)
            shutil.copy(public, held / NODES)
            join = ["join", reached, "--data", str(file), "--rank", str(plan.ranks[client])]
            join += ["--keys", str(place), "--state", str(folder / f"state-{client}")]
            joins.enter_context(_flexlora(join, folder / f"{client}.log"))
        _follow(server, folder / "server.log")
    if server.returncode:
        raise ProtocolError(
            f"The demo's server ended with code {server.returncode}; see {folder / 'server.log'}."
        )
    return list(Record(run).events())


def _wait_for(address: str, server: subprocess.Popen[bytes]) -> None:
    """Until the server listens, or has ended: clients that come too early wait for longer."""
    host, _, port = address.rpartition(":")
    while server.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex((host, int(port))) == 0:
                return
        time.sleep(0.2)


def _follow(process: subprocess.Popen[bytes], log: Path) -> None:
    """Print what a process writes, until it ends."""
    with log.open(encoding="utf-8") as text:
        while process.poll() is None:
            _pass_on(text)
            time.sleep(0.3)
        _pass_on(text)


def _pass_on(text: IO[str]) -> None:
    for line in text:
        print(f"  {line.rstrip()}", flush=True)


@contextmanager
def _flexlora(arguments: Sequence[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process of the command line, with its log; ended at the end."""
    few = {name: str(_THREADS) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "flexlora", *arguments],
            stdout=out,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **few},
        )
        try:
            yield process
        finally:
            process.terminate()
            process.wait()


def _simulated(folder: Path, rows: Corpus, plan: Plan) -> list[Event]:
    ready = setup.prepare(settings({"format": "table", "path": "-"}, plan), rows)
    return list(rounds.run(ready, folder / "simulated"))


def _rounds(events: Sequence[Event]) -> list[float]:
    return [event["seconds"] for event in events if event["event"] == "round"]


def _files(rows: Corpus, folder: Path, plan: Plan) -> dict[str, Path]:
    """Each client's rows, in a file of its own."""
    folder.mkdir()
    files = {client: folder / f"{client}.jsonl" for client in plan.ranks}
    for row in rows.table.to_pylist():
        with files[row.pop("client")].open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    return files


def _toml(content: dict[str, Any], place: str = "") -> str:
    """Nested tables as TOML; JSON spells their values alike."""
    inner = {key: value for key, value in content.items() if isinstance(value, dict)}
    lines = [f"{key} = {json.dumps(v)}" for key, v in content.items() if key not in inner]
    for key, value in inner.items():
        name = f"{place}.{key}" if place else key
        lines += [f"\n[{name}]", _toml(value, name)]
    return "\n".join(lines)
