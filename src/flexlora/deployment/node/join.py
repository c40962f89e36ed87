"""`flexlora join`: a client's machine in a federation, until it is stopped."""

from __future__ import annotations

import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from flexlora import addresses
from flexlora.deployment.flower.processes import Process
from flexlora.deployment.flower.supernode import supernode
from flexlora.deployment.keys import NodeKey
from flexlora.deployment.node.node import Node, NodeConfig
from flexlora.deployment.node.worker_socket import Response, Worker
from flexlora.errors import ConfigError, ProtocolError
from flexlora.journal import duration, size

_LOOK_SECONDS: Final = 0.5
_PROBE_SECONDS: Final = 5.0
_FIRST_PAUSE_SECONDS: Final = 5.0
_LONGEST_PAUSE_SECONDS: Final = 20.0
_REJECTED: Final = 305 % 256
"""Flower's exit code 305, as the system reports it: the server does not know the node's key."""
_UNTRUSTED: Final = "CERTIFICATE_VERIFY_FAILED"
"""Part of a SuperNode's log if it does not trust the server's certificate."""

Print = Callable[[str], None]


@dataclass(frozen=True)
class LoggedNode:
    """A node that prints a line on each request."""

    node: Node
    print_line: Print

    def handle(self, header: Mapping[str, Any], payload: bytes) -> Response:
        """The node's response, with a line on it."""
        started = time.monotonic()
        response, data = self.node.handle(header, payload)
        seconds = duration(time.monotonic() - started)
        if "error" in response:
            self.print_line(f"failed: {response['error']}")
        elif header.get("kind") == "enrol":
            self.print_line(_enrolment_line(response))
        else:
            sizes = f"{size(len(payload))} down, {size(len(data))} up"
            self.print_line(f"round {response['round']}: {seconds}, {sizes}")
        return response, data


def _enrolment_line(response: Mapping[str, Any]) -> str:
    attention, feed_forward = response["attention"], response["feed_forward"]
    ranks = (
        f"rank {attention}"
        if attention == feed_forward
        else f"attention rank {attention}, feed-forward rank {feed_forward}"
    )
    speed = response["tokens_per_second"]
    measured = "" if speed is None else f", {speed:.0f} tokens/s"
    return f"joined with {response['examples']} examples, up to {ranks}{measured}"


def join(address: str, config: NodeConfig, keys: NodeKey | None, print_line: Print) -> None:
    """Take part in the federation at ``address`` until interrupted.

    Raises:
        ConfigError: the address is not HOST:PORT, or this machine does not have the device.
        ProtocolError: the data cannot be used, or an insecure server is not on this machine.
    """
    if keys is None and not addresses.is_loopback(address.rpartition(":")[0]):
        raise ProtocolError(
            f"--insecure is for a server on this machine, not for {address}: give --keys, the "
            "folder with your key and the server's ca.crt."
        )
    addresses.parse(address, "join", "server.example:8090", free=False)
    if config.device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(
            f"--device is {config.device!r}, but PyTorch finds no CUDA device on this machine; "
            "join with --device cpu."
        )
    node = Node(config)
    print_line(f"{len(node.rows)} training rows, which stay on this machine")
    for notice in node.rows.notices:
        print_line(notice)
    sockets = Path(tempfile.mkdtemp(prefix="flexlora-"))
    worker = Worker(sockets / "worker", LoggedNode(node, print_line).handle)
    process = supernode(address, config.state / "flower", sockets / "worker", keys)
    threading.Thread(target=worker.serve, daemon=True).start()
    try:
        _run_supernode(process, address, print_line)
    finally:
        process.stop()
        worker.close()
        shutil.rmtree(sockets)


def _run_supernode(process: Process, address: str, print_line: Print) -> None:
    """Start the SuperNode, and again whenever it ends, after longer and longer pauses.

    After a crash the server still counts the node as online for about a minute, and does not
    accept it before.
    """
    pause = _FIRST_PAUSE_SECONDS
    while True:
        fault = _unreachable(address)
        print_line(
            f"connecting to {address} ..."
            if fault is None
            else f"no server answers at {address} ({fault}); trying until one does"
        )
        process.start()
        started = time.monotonic()
        while process.ended is None:
            time.sleep(_LOOK_SECONDS)
        if time.monotonic() - started > _LONGEST_PAUSE_SECONDS:
            pause = _FIRST_PAUSE_SECONDS
        print_line(f"{_why_ended(process)} Trying again in {pause:.0f} s.")
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)


def _unreachable(address: str) -> str | None:
    """Why no connection to the server can be made; None if one can."""
    target = addresses.split(address)
    if target is None:
        return "not of the form HOST:PORT"
    try:
        socket.create_connection(target, _PROBE_SECONDS).close()
    except OSError as error:
        return str(error.strerror or error)
    return None


def _why_ended(process: Process) -> str:
    """A sentence on why the SuperNode ended."""
    if process.ended == _REJECTED:
        return (
            "The server does not know this node's key (yet); send your NAME.pub to the server's "
            "owner."
        )
    if _UNTRUSTED in process.last_lines(40):
        return (
            "This node does not trust the server's certificate: ca.crt is of another server, or "
            "the certificate does not name the host in HOST:PORT; get the server's ca.crt from "
            "its owner."
        )
    return (
        f"Flower's SuperNode ended with code {process.ended}, as it does when the server revokes "
        f"the key; see {process.log}."
    )
