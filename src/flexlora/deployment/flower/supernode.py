"""Flower's SuperNode: it connects a client's machine to the server, and passes messages on."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Final

from flexlora.deployment.flower.processes import Process, environment, free_port, program
from flexlora.deployment.keys import NodeKey
from flexlora.storage import close_to_others, write_atomically

REFUSED: Final = "refused.json"
"""Where the SuperNode writes, in its folder, why it refuses what the server sends."""
_PROCESSES: Final = "flexlora.deployment.flower.node_processes"
MOST_BYTES: Final = "FLEXLORA_MOST_MESSAGE_BYTES"
"""Environment variable of the most bytes of one message from the server."""


def supernode(
    address: str, home: Path, worker: Path, keys: NodeKey | None, most_bytes: int
) -> Process:
    """A SuperNode that passes messages on to the worker's socket; without ``keys`` insecure.

    It runs the installed app alone, and takes no message of more than ``most_bytes``.
    """
    secure = (
        ["--insecure"]
        if keys is None
        else ["--root-certificates", str(keys.ca), "--auth-supernode-private-key", str(keys.key)]
    )
    program("flower-supernode")  # refuses where Flower is not installed
    (home / REFUSED).unlink(missing_ok=True)
    programs = home / "programs"
    close_to_others(home)
    programs.mkdir(parents=True, exist_ok=True)
    _write_program(programs / "flwr-clientapp", f"{_PROCESSES} message")
    env = environment(home) | {MOST_BYTES: str(most_bytes)}
    env["PATH"] = os.pathsep.join([str(programs.resolve()), env["PATH"]])
    arguments = [
        *(sys.executable, "-P", "-m", _PROCESSES, "supernode", "--superlink", address, *secure),
        *("--port", str(free_port()), "--node-config", f'worker="{worker}"'),
    ]
    return Process(arguments, home / "supernode.log", env)


def _write_program(path: Path, module: str) -> None:
    """A shell script that runs a module, with its arguments, with this Python.

    -P ignores the current folder.
    """
    script = f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -P -m {module} "$@"\n'
    write_atomically(path, script.encode(), mode=0o700)


def refusal(home: Path) -> str | None:
    """Why the SuperNode of ``home`` has last refused what the server sent; None if it has not."""
    try:
        content = json.loads((home / REFUSED).read_bytes())
    except (OSError, ValueError):
        return None
    return str(content.get("sentence")) if isinstance(content, dict) else None


def write_refusal(home: Path, sentence: str) -> None:
    """Write a sentence for ``refusal``."""
    write_atomically(home / REFUSED, json.dumps({"sentence": sentence}).encode())
