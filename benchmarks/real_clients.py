"""The overhead of Flower, TLS and separate processes in a federation of real clients.

One client trains SmolLM2-135M for at least half a minute per round, over Flower and then in this
process, on one thread each; a relay counts the bytes between the client and the server.
"""

from __future__ import annotations

import argparse
import socket
import sys
import tempfile
import threading
from dataclasses import asdict
from pathlib import Path
from statistics import median

from result import Claim, Table, finish, setting

from flexlora.deployment.demo import Plan, show
from flexlora.deployment.flower.superlink import free_port

MOST_OVERHEAD = 0.20
MOST_BYTES = 0.02


class Relay:
    """Forwards one port to another, and counts the bytes in both directions."""

    def __init__(self, port: int) -> None:
        self.port, self.bytes = port, 0
        self.lock = threading.Lock()
        self.listener = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def reached(self) -> int:
        """The port for clients."""
        return int(self.listener.getsockname()[1])

    def _accept(self) -> None:
        while True:
            one, _ = self.listener.accept()
            try:
                other = socket.create_connection(("127.0.0.1", self.port))
            except OSError:  # the server is not there yet, or no more
                one.close()
                continue
            for source, target in ((one, other), (other, one)):
                threading.Thread(target=self._pass, args=(source, target), daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket) -> None:
        try:
            while data := source.recv(2**20):
                with self.lock:
                    self.bytes += len(data)
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)
        except OSError:
            source.close()
            target.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--steps", type=int, default=16)
    options = parser.parse_args()
    port = free_port()
    relay = Relay(port)
    plan = Plan({"word_sorting": options.rank}, options.steps, 100, port, relay.reached)
    with tempfile.TemporaryDirectory() as folder:
        found = show(Path(folder) / "run", plan)
    real, simulated = (median(seconds) for seconds in found.rounds_seconds)
    turn = median(found.turns_seconds)
    claims = [
        Claim("seconds of a turn", turn, 30.0, True),
        Claim(
            "a round over Flower over one in process, less one",
            real / simulated - 1,
            MOST_OVERHEAD,
            False,
        ),
        Claim(
            "bytes between client and server over the payloads, less one",
            relay.bytes / found.bytes - 1,
            MOST_BYTES,
            False,
        ),
        Claim("difference of the adapters' products", found.difference, 1e-6, False),
    ]
    head = ["", "rounds, s", "turn, s", "bytes"]
    rows = [
        ["over Flower", _all(found.rounds_seconds[0]), f"{turn:.1f}", relay.bytes],
        ["in process", _all(found.rounds_seconds[1]), "", found.bytes],
    ]
    tables = [Table("One client, three rounds", head, rows)]
    measured = asdict(found) | {"adapter": "", "bytes_relayed": relay.bytes}
    return finish(Path(__file__).stem, setting(1), measured, tables, claims)


def _all(seconds: list[float]) -> str:
    return " / ".join(f"{value:.1f}" for value in seconds)


if __name__ == "__main__":
    sys.exit(main())
