"""What the checks of a round cost: of uploads as they arrive, of their influence, of the result.

One run of SmolLM2-135M with twenty clients of the paper's ranks, 8 to 200, on generated puzzles:
every client trains a few rows, so that the checks have little to hide behind. The seconds of the
checks are those of the functions that do them, in the same run as local training and the server's
step. Checks run while nothing else does; the process has all threads in both.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from result import Claim, Table, finish, setting

from flexlora.federation import compose
from flexlora.federation.collect import Collector
from flexlora.federation.influence import result
from flexlora.federation.influence.screen import Screen
from flexlora.federation.rounds import run
from flexlora.federation.setup import prepare

CLIENTS = 20
MOST = 0.02


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--rows", type=int, default=4, help="examples of the one step of a client")
    parser.add_argument("--quick", action="store_true", help="four clients, one round")
    return parser.parse_args()


def config(options: argparse.Namespace) -> dict[str, Any]:
    """Twenty clients of equal numbers of each of the paper's rank types."""
    clients = 4 if options.quick else CLIENTS
    return {
        "seed": 1,
        "model": {"name": "smollm2-135m-instruct"},
        "data": {
            "format": "procedural",
            "examples": 20,
            "clients": clients,
            "max_tokens": 256,
        },
        "ranks": {"distribution": "uniform"},
        "training": {"max_steps": 1, "batch_examples": options.rows, "pack_tokens": 512},
        "federation": {"rounds": 1 if options.quick else options.rounds, "cohort": clients},
        "evaluation": {"base": False, "seen_clients": 0, "unseen_clients": 0},
        "run": {"threads": options.threads, "clients_at_once": 1},
    }


def timed(place: Any, name: str, label: str, seconds: Counter[str]) -> None:
    """Let a function add the seconds that it takes to ``seconds``."""
    function: Callable[..., Any] = getattr(place, name)

    def measured(*given: Any, **named: Any) -> Any:
        started = time.perf_counter()
        try:
            return function(*given, **named)
        finally:
            seconds[label] += time.perf_counter() - started

    setattr(place, name, measured)


def watched() -> Counter[str]:
    """The seconds of every check, counted from now on."""
    seconds: Counter[str] = Counter()
    timed(Collector, "_checked", "upload: form, finite, norms", seconds)
    timed(Screen, "measure", "influence: change of the product", seconds)
    timed(Screen, "refused", "influence: comparison", seconds)
    timed(result, "fault", "result", seconds)
    return seconds


def main() -> int:
    options = arguments()
    place = setting(options.threads)
    torch.set_num_threads(options.threads)
    seconds = watched()
    with tempfile.TemporaryDirectory() as folder:
        ready = prepare(compose.parse(config(options), "checks"))
        events = list(run(ready, Path(folder) / "run"))
    rounds = [e for e in events if e["event"] == "round"]
    clients = [e for e in events if e["event"] == "client"]
    ranks = Counter(e["rank_type"] for e in clients)
    training = sum(e["seconds"] for e in clients)
    step = sum(e["aggregate_seconds"] for e in rounds) - seconds["result"]
    whole = sum(e["seconds"] for e in rounds)
    checks = sum(seconds.values())
    measurements = {
        "options": vars(options),
        "ranks": dict(ranks),
        "checks_seconds": dict(seconds),
        "training_seconds": training,
        "step_seconds": step,
        "round_seconds": whole,
    }
    count = len(rounds)
    rows = [[name, taken / count, taken / whole] for name, taken in seconds.items()]
    rows += [["local training", training / count, training / whole]]
    rows += [["server step", step / count, step / whole]]
    table = Table("Seconds of a round", ("part", "seconds", "share of the round"), rows)
    full = not options.quick
    ratio = checks / (training + step)
    claims = [
        Claim("seconds of all checks / local training and server step", ratio, MOST, False, full)
    ]
    name = Path(__file__).stem + ("-quick" if options.quick else "")
    return finish(name, place, measurements, [table], claims)


if __name__ == "__main__":
    sys.exit(main())
