"""A served federation of real processes on loopback, and the ways in which they are killed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from flexlora import addresses
from flexlora.deployment import certificates, keys
from flexlora.deployment.flower.processes import free_port
from flexlora.deployment.keys import NODES
from flexlora.federation import rounds, setup
from flexlora.journal.record import Record
from flexlora.peft_format import WEIGHTS
from support import flower, models

RANKS = {"client0": 2, "client1": 5, "client2": 3}

SOONER = {
    "PYTHONPATH": os.pathsep.join(
        [str(Path(__file__).parent / "sooner"), os.environ.get("PYTHONPATH", "")]
    )
}
"""The environment in which Flower counts a node that was killed as online for 20 seconds alone."""


@dataclass
class Site:
    """A folder with a model, keys, the clients' data, and the processes that run there.

    ``within`` has, by the name of a process, the command that runs it where it shall run.
    """

    folder: Path
    rounds: int
    method: str = "flexlora"
    deadline: float = 45.0
    ranks: Mapping[str, int] = field(default_factory=lambda: RANKS)
    quorum: int | None = None
    address: str = field(default_factory=lambda: f"127.0.0.1:{free_port()}")
    within: Mapping[str, Sequence[str]] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)
    processes: dict[str, subprocess.Popen] = field(default_factory=dict)

    def __post_init__(self) -> None:
        models.save(self.folder / "model")
        (self.folder / "data").mkdir()
        self.files = flower.data_of(models.corpus(), self.folder / "data")
        certificates.make_server(self.folder / "keys", [self.host])
        (self.folder / "keys" / NODES).mkdir(mode=0o700)
        for client in self.ranks:
            self.give_key(client)
        models.write_config(
            self.folder / "plan.toml",
            self.folder,
            data={"format": "remote", "path": None, "cache": None, "unseen_clients": None},
            ranks={
                "types": {
                    f"r{rank}": {"attention": rank, "feed_forward": rank} for rank in (2, 5, 3)
                },
                "distribution": None,
                "clients": {client: f"r{rank}" for client, rank in self.ranks.items()},
            },
            method={"name": self.method},
            federation={
                "rounds": self.rounds,
                "cohort": len(self.ranks),
                "quorum": self.quorum or len(self.ranks),
                "attempts": 20,
                "deadline_seconds": self.deadline,
            },
            evaluation={"seen_clients": 0, "unseen_clients": 0, "base": False, "truncated": False},
            run={"clients_at_once": None},
        )

    @property
    def host(self) -> str:
        return addresses.parse(self.address, "a site", "127.0.0.1:8090")[0]

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def give_key(self, client: str) -> None:
        """Make a client's key, and let it in; it may have had another before."""
        place = self.folder / "keys" / client
        shutil.rmtree(place, ignore_errors=True)
        public = keys.make_node(place, client)
        shutil.copy(self.folder / "keys" / "ca.crt", place)
        shutil.copy(public, self.let_in(client))

    def let_in(self, client: str) -> Path:
        """The server's file by which a client may take part."""
        return self.folder / "keys" / NODES / f"{client}.pub"

    def said(self, name: str) -> str:
        """What a process has printed, in one line."""
        return " ".join((self.folder / f"{name}.log").read_text(errors="replace").split())

    def state(self, client: str) -> Path:
        """What a client keeps to itself."""
        return self.folder / f"state-{client}"

    def serve(self, resume: bool = False) -> None:
        what = (
            ["--resume", str(self.run)]
            if resume
            else [str(self.folder / "plan.toml"), "--out", str(self.run)]
        )
        keys_ = ["--keys", str(self.folder / "keys")]
        self._start("serve", ["serve", *what, "--listen", self.address, *keys_])

    def join(self, client: str) -> None:
        place = self.folder / "keys" / client
        told = ["--data", str(self.files[client]), "--rank", str(self.ranks[client])]
        told += ["--keys", str(place), "--state", str(self.state(client))]
        told += ["--model", str(self.folder / "model")]
        self._start(client, ["join", self.address, *told])

    def _start(self, name: str, arguments: list[str]) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [*self.within.get(name, ()), sys.executable, "-m", "flexlora", *arguments],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **self.env},
            )

    def events(self, *kinds: str) -> list[dict]:
        return list(Record(self.run).events(*kinds))

    def until(self, true: Callable[[], bool], seconds: float, what: str) -> float:
        """Wait; how long it took."""
        started = time.monotonic()
        while not true():
            if self.processes["serve"].poll():
                raise AssertionError(f"the server has ended: {what}\n{self.logs()}")
            if time.monotonic() - started > seconds:
                raise AssertionError(f"not within {seconds} s: {what}\n{self.logs()}")
            time.sleep(0.1)
        return time.monotonic() - started

    def asked(self, round: int, client: str) -> Callable[[], bool]:
        """Whether a client has been handed its job of a round."""
        return lambda: any(
            e["round"] == round and e["client"] == client for e in self.events("asked")
        )

    def done(self, round: int) -> Callable[[], bool]:
        return lambda: any(e["round"] >= round for e in self.events("round"))

    def finished(self) -> bool:
        return bool(self.events("finish"))

    def lost(self, round: int, client: str) -> list[str]:
        """Why a client's turn of a round was lost, as often as it was."""
        events = self.events("lost")
        return [e["reason"] for e in events if (e["round"], e["client"]) == (round, client)]

    def has_come(self, round: int, client: str) -> bool:
        """Whether a client's upload of a round is there."""
        return any((e["round"], e["client"]) == (round, client) for e in self.events("client"))

    def listens(self) -> bool:
        target = addresses.split(self.address)
        probe = f"import socket; socket.create_connection({target!r}, 1).close()"
        command = [*self.within.get("serve", ()), sys.executable, "-c", probe]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    def begin(self) -> None:
        """Start the server, and all clients once it listens."""
        self.serve()
        self.until(self.listens, 90, "the server to listen")
        for client in self.ranks:
            self.join(client)

    def assert_as_if_nothing_happened(self) -> None:
        """Of a finished run: every round had every client, and the adapter is a simulation's."""
        how = {
            "method": {"name": self.method},
            "federation": {"rounds": self.rounds, "cohort": len(self.ranks)},
        }
        corpus = models.corpus()
        mine = corpus.select([owner in self.ranks for owner in corpus.keys("client")])
        settings = flower.settings(self.folder, dict(self.ranks), **how)
        ready = setup.prepare(settings, mine)
        *_, wanted = rounds.run(ready, self.folder / "simulated")
        got = Path(self.events("finish")[-1]["adapter"])
        expected = Path(wanted["adapter"])
        assert (got / WEIGHTS).read_bytes() == (expected / WEIGHTS).read_bytes()
        assert [e["round"] for e in self.events("round")] == list(range(1, self.rounds + 1))
        assert all(e["received"] == len(self.ranks) for e in self.events("round"))

    def pids(self, *words: str) -> list[int]:
        """The processes of this site in whose command all of these words stand."""
        listed = subprocess.run(
            ["ps", "-A", "-ww", "-o", "pid=,args="], capture_output=True, text=True
        )
        lines = [line.split(None, 1) for line in listed.stdout.splitlines()]
        return [int(pid) for pid, args in lines if all(word in args for word in words)]

    def kill(self, *words: str, how: int = signal.SIGKILL) -> int:
        """Send a signal to these processes; how many there were."""
        found = self.pids(*words)
        for pid in found:
            try:
                os.kill(pid, how)
            except ProcessLookupError:
                continue
        return len(found)

    def logs(self) -> str:
        texts = []
        for path in sorted([*self.folder.glob("*.log"), *self.run.glob("flower/*.log")]):
            texts.append(f"--- {path.name}\n" + path.read_text(errors="replace")[-1500:])
        journal = [json.dumps(e)[:160] for e in self.events() if e["event"] != "spectrum"]
        return "\n".join([*texts, *journal[-25:]])

    def stop(self) -> None:
        for process in self.processes.values():
            process.terminate()
        for process in self.processes.values():
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for pid in self.pids(str(self.folder)):
            os.kill(pid, signal.SIGKILL)
