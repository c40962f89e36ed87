"""Flower's SuperNode: it connects a client's machine to the server, and passes messages on."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

from flexlora.deployment.flower.processes import Process, environment, free_port, program
from flexlora.deployment.keys import NodeKey
from flexlora.storage import write_atomically


def supernode(address: str, home: Path, worker: Path, keys: NodeKey | None) -> Process:
    """A SuperNode that passes messages on to the worker's socket; without ``keys`` insecure."""
    secure = (
        ["--insecure"]
        if keys is None
        else ["--root-certificates", str(keys.ca), "--auth-supernode-private-key", str(keys.key)]
    )
    programs = home / "programs"
    programs.mkdir(parents=True, exist_ok=True)
    _write_program(programs / "flwr-clientapp", "flexlora.deployment.flower.pull_backoff")
    env = environment(home)
    env["PATH"] = os.pathsep.join([str(programs.resolve()), env["PATH"]])
    arguments = [
        *(program("flower-supernode"), "--superlink", address, *secure),
        *("--port", str(free_port()), "--node-config", f'worker="{worker}"'),
    ]
    return Process(arguments, home / "supernode.log", env)


def _write_program(path: Path, module: str) -> None:
    """A shell script that runs a module with this Python; -P ignores the current folder."""
    script = f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -P -m {module} "$@"\n'
    write_atomically(path, script.encode(), mode=0o700)
