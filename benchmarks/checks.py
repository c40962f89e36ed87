"""What the checks of a round cost: of uploads as they arrive, of their influence, of the result.

Runs of SmolLM2-135M with twenty clients of the paper's ranks, 8 to 200, on generated puzzles. The
checks take the same time however long clients train, so that there are two runs: one in which every
client trains as long as in configs/natural-instructions.toml, and a short one in which it takes a
single step. The seconds of the checks are those of the functions that do them, in the same process
as local training and the server's step, which do nothing meanwhile. CPU seconds are those of all
threads; on a machine that has other work they say more than the seconds on the clock.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from result import Claim, Table, finish, setting

from flexlora.federation import collect, compose, rounds
from flexlora.federation.collect import Collector
from flexlora.federation.influence import result
from flexlora.federation.influence.screen import Screen
from flexlora.federation.rounds import run
from flexlora.federation.setup import prepare
from flexlora.federation.simulated import SimulatedTransport

CLIENTS = 20
MOST = 0.02

STEPS, ROWS = 2, 6
"""Of a client in configs/natural-instructions.toml."""
SHORT_ROWS = 4
MEDIAN_ROWS = 199
"""Of the clients of Natural Instructions, which train one epoch of them in the paper."""

TRAINING, STEP = "local training", "server step"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="four clients, one round")
    return parser.parse_args()


@dataclass
class Times:
    """Seconds by part of a round: on the clock, and of all threads of the process."""

    wall: Counter[str] = field(default_factory=Counter)
    cpu: Counter[str] = field(default_factory=Counter)

    def call(self, label: str, function: Callable[..., Any], *given: Any, **named: Any) -> Any:
        """Call a function, and count what it takes."""
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            return function(*given, **named)
        finally:
            self.wall[label] += time.perf_counter() - wall
            self.cpu[label] += time.process_time() - cpu

    def watch(self, place: Any, name: str, label: str) -> None:
        """Count from now on what a function of ``place`` takes."""
        function = getattr(place, name)

        def watched(*given: Any, **named: Any) -> Any:
            return self.call(label, function, *given, **named)

        setattr(place, name, watched)

    def watch_training(self) -> None:
        """The time until the next reply of a simulated client, from when it is asked for."""
        exchange = SimulatedTransport.exchange

        def watched(*given: Any, **named: Any) -> Any:
            replies = exchange(*given, **named)
            while (reply := self.call(TRAINING, next, replies, None)) is not None:
                yield reply

        SimulatedTransport.exchange = watched  # type: ignore[method-assign]

    def watch_sums(self) -> None:
        """The time of an upload's SHA-256, which is taken twice for that."""
        write = collect.write_summed

        def watched(path: Path, data: bytes) -> str:
            self.call("upload: SHA-256", lambda: hashlib.sha256(data).hexdigest())
            return write(path, data)

        collect.write_summed = watched  # type: ignore[attr-defined]


def watched() -> Times:
    """The times of every check, of training and of the server's step, from now on."""
    times = Times()
    times.watch_sums()
    times.watch(Collector, "_checked", "upload: form, values")
    times.watch(Screen, "measure", "influence: size of the change")
    times.watch(Screen, "refused", "influence: comparison")
    times.watch(result, "fault", "result")
    times.watch(rounds, "_aggregated", STEP)
    times.watch_training()
    return times


def config(options: argparse.Namespace, steps: int, rows: int) -> dict[str, Any]:
    """Clients of equal numbers of each of the paper's rank types."""
    clients = 4 if options.quick else CLIENTS
    return {
        "seed": 1,
        "model": {"name": "smollm2-135m-instruct"},
        "data": {
            "format": "procedural",
            "examples": 20,
            "clients": clients,
            "max_tokens": 384,
        },
        "ranks": {"distribution": "uniform"},
        "training": {"max_steps": steps, "batch_examples": rows, "pack_tokens": 512},
        "federation": {"rounds": 1 if options.quick else options.rounds, "cohort": clients},
        "evaluation": {"base": False, "seen_clients": 0, "unseen_clients": 0},
        "run": {"threads": options.threads, "clients_at_once": 1},
    }


@dataclass(frozen=True)
class Measured:
    """One run: what its clients trained, and the seconds of a round by part."""

    rows: int
    tokens: float
    rounds: int
    ranks: Mapping[str, int]
    wall: Mapping[str, float]
    cpu: Mapping[str, float]

    def share(self, seconds: Mapping[str, float]) -> float:
        """The checks as a share of local training and the server's step."""
        work = seconds[TRAINING] + seconds[STEP]
        return (sum(seconds.values()) - work) / work

    def table(self) -> Table:
        """The seconds of a round."""
        title = f"{self.rows} rows, {self.tokens:.0f} tokens a client; mean of {self.rounds} rounds"
        whole = sum(self.wall.values()), sum(self.cpu.values())
        rows = [
            [name, self.wall[name], self.wall[name] / whole[0], cpu, cpu / whole[1]]
            for name, cpu in self.cpu.items()
        ]
        head = ("part", "seconds", "share", "CPU seconds", "share")
        return Table(title, head, sorted(rows, key=lambda row: -float(row[3])))


def measured(options: argparse.Namespace, times: Times, steps: int, rows: int) -> Measured:
    """Run once, and count."""
    times.wall.clear()
    times.cpu.clear()
    with tempfile.TemporaryDirectory() as folder:
        ready = prepare(compose.parse(config(options, steps, rows), "checks"))
        events = list(run(ready, Path(folder) / "run"))
    clients = [e for e in events if e["event"] == "client"]
    count = sum(e["event"] == "round" for e in events)
    return Measured(
        steps * rows,
        sum(e["tokens"] for e in clients) / len(clients),
        count,
        Counter(e["rank_type"] for e in clients),
        {name: seconds / count for name, seconds in times.wall.items()},
        {name: seconds / count for name, seconds in times.cpu.items()},
    )


def enough_rows(usual: Measured, short: Measured) -> float:
    """From how many rows of a client on the checks are below ``MOST``, by CPU seconds.

    Local training is taken to grow with its rows as from the one run to the other.
    """
    row = (usual.cpu[TRAINING] - short.cpu[TRAINING]) / (usual.rows - short.rows)
    work = usual.cpu[TRAINING] + usual.cpu[STEP]
    return usual.rows + ((sum(usual.cpu.values()) - work) / MOST - work) / row


def main() -> int:
    options = arguments()
    place = setting(options.threads)
    torch.set_num_threads(options.threads)
    times = watched()
    usual = measured(options, times, STEPS, ROWS)
    short = measured(options, times, 1, SHORT_ROWS)
    full = not options.quick
    text = "seconds of all checks / local training and server step"
    runs = ((usual, "as configured"), (short, "one short step"))
    claims = [
        Claim(f"{name}, {which} {text}", each.share(seconds), MOST, False, False)
        for each, name in runs
        for which, seconds in (("clock", each.wall), ("CPU", each.cpu))
    ]
    rows = "rows of a client from which the checks are below 2 %, by CPU seconds"
    claims.append(Claim(rows, enough_rows(usual, short), MEDIAN_ROWS, False, full))
    measurements = {"options": vars(options), "usual": vars(usual), "short": vars(short)}
    name = Path(__file__).stem + ("-quick" if options.quick else "")
    return finish(name, place, measurements, [usual.table(), short.table()], claims)


if __name__ == "__main__":
    sys.exit(main())
