"""`flexlora join`: a data owner's machine in a federation, until it is told to stop."""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from flexlora.deployment.flower.superlink import Process, supernode
from flexlora.deployment.keys import NodeKey
from flexlora.deployment.node.node import Node, NodeConfig
from flexlora.deployment.node.worker_socket import Answer, Worker
from flexlora.deployment.server.supervisor import is_loopback
from flexlora.errors import ProtocolError
from flexlora.journal import duration, size

_LOOK_SECONDS: Final = 0.5
_FIRST_PAUSE_SECONDS: Final = 5.0
_LONGEST_PAUSE_SECONDS: Final = 20.0
_REFUSED: Final = 305 % 256
"""Flower's exit code, as the system has it, for a node that is not let in."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Told:
    """A node whose owner is told what is asked of it."""

    node: Node
    say: Say

    def answer(self, header: Mapping[str, Any], payload: bytes) -> Answer:
        """The node's answer, with a line on it."""
        started = time.monotonic()
        said, data = self.node.answer(header, payload)
        seconds = duration(time.monotonic() - started)
        if "error" in said:
            self.say(f"failed: {said['error']}")
        elif header.get("kind") == "enrol":
            rank = f"{said['attention']} / {said['feed_forward']}"
            speed = said["tokens_per_second"]
            pace = "" if speed is None else f", {speed:.0f} tokens/s"
            self.say(f"joined with {said['examples']} rows, rank {rank} at most{pace}")
        else:
            sizes = f"{size(len(payload))} down, {size(len(data))} up"
            self.say(f"round {said['round']}: {seconds}, {sizes}")
        return said, data


def join(address: str, owner: NodeConfig, keys: NodeKey | None, say: Say) -> None:
    """Take part in the federation at ``address`` until interrupted.

    Raises:
        ProtocolError: the data cannot be used, or an insecure server is not on this machine.
    """
    if keys is None and not is_loopback(address.rpartition(":")[0]):
        raise ProtocolError(
            f"--insecure is for a server on this machine, not for {address}: give --keys, the "
            "folder with your key and the server's ca.crt."
        )
    node = Node(owner)
    say(f"{len(node.rows)} rows to train on stay on this machine")
    sockets = Path(tempfile.mkdtemp(prefix="flexlora-"))
    worker = Worker(sockets / "worker", Told(node, say).answer)
    process = supernode(address, owner.state / "flower", sockets / "worker", keys)
    threading.Thread(target=worker.serve, daemon=True).start()
    try:
        _keep_up(process, say)
    finally:
        process.stop()
        worker.close()
        shutil.rmtree(sockets)


def _keep_up(process: Process, say: Say) -> None:
    """Start the SuperNode, and again whenever it ends, after longer and longer pauses.

    After a crash the server still counts the node as online for about a minute, and lets it
    in no sooner.
    """
    pause = _FIRST_PAUSE_SECONDS
    while True:
        process.start()
        started = time.monotonic()
        while process.ended is None:
            time.sleep(_LOOK_SECONDS)
        if time.monotonic() - started > _LONGEST_PAUSE_SECONDS:
            pause = _FIRST_PAUSE_SECONDS
        why = (
            "the server does not let this node in (yet): has it your public key?"
            if process.ended == _REFUSED
            else f"Flower's SuperNode ended with code {process.ended}, as it does when the server "
            f"takes your key out; see {process.log}."
        )
        say(f"{why} Trying again in {pause:.0f} s.")
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
