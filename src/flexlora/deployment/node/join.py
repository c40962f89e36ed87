"""`flexlora join`: a client's machine in a federation, until it has the finished adapter."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import torch

from flexlora import peft_format
from flexlora.config import RankType
from flexlora.deployment.flower import local_users
from flexlora.deployment.flower.processes import Process
from flexlora.deployment.flower.supernode import refusal, supernode
from flexlora.deployment.keys import NodeKey
from flexlora.deployment.node import finished, preflight
from flexlora.deployment.node.node import Node, NodeConfig
from flexlora.deployment.node.preflight import Fault
from flexlora.deployment.node.worker_socket import Response, Worker
from flexlora.errors import ConfigError, ProtocolError
from flexlora.journal import counted, duration, size
from flexlora.storage import scratch
from flexlora.storage.untrusted import short

_LOOK_SECONDS: Final = 0.5
_PROBE_SECONDS: Final = 10.0
_FIRST_PAUSE_SECONDS: Final = 5.0
_LONGEST_PAUSE_SECONDS: Final = 20.0
_REMIND_SECONDS: Final = 300.0
"""After this time a fault that lasts is printed again."""
_LAST_SECONDS: Final = 60.0
"""How long a client that has the adapter waits to be told that the server knows that."""
_REJECTED: Final = 305 % 256
"""Flower's exit code 305, as the system reports it: the server does not accept the node."""

Print = Callable[[str], None]


@dataclass(frozen=True)
class LoggedNode:
    """A node that prints lines on each request; ``ended`` is set when the run is over."""

    node: Node
    print_line: Print
    adapter: dict[str, Any] = field(default_factory=dict)
    ended: threading.Event = field(default_factory=threading.Event)

    def handle(self, header: Mapping[str, Any], payload: bytes) -> Response:
        """The node's response, with a line before it and one on it."""
        started, kind = time.monotonic(), header.get("kind")
        for line in (*_unused(header), *self._beginning(header)):
            self.print_line(line)
        response, data = self.node.handle(header, payload)
        seconds = duration(time.monotonic() - started)
        if "error" in response:
            self.print_line(f"failed: {response['error']}")
        elif kind == "enrol":
            self.print_line(_enrolment_line(response))
        elif kind == "turn":
            sizes = f"{size(len(payload))} down, {size(len(data))} up"
            self.print_line(f"round {response['round']}: trained in {seconds}, {sizes}")
        elif kind == "evaluate":
            self.print_line(_evaluation_line(response))
        elif kind == "store":
            self.adapter.update({**response, "base": self.node.published})
        elif kind == "over":
            self.ended.set()
        return response, data

    def _beginning(self, header: Mapping[str, Any]) -> list[str]:
        """What is printed before a request is handled."""
        kind = header.get("kind")
        if kind == "enrol" and not self.node.is_enrolled:
            return ["the server has answered; loading the base model and preparing the rows ..."]
        if kind == "turn":
            return [f"round {short(header.get('round'))}: training ..."]
        if kind == "store" and not self.adapter:
            return ["the federation is finished; checking its adapter ..."]
        return []


def _unused(header: Mapping[str, Any]) -> list[str]:
    """Lines on earlier uploads that the server did not use."""
    unused = header.get("unused")
    if not isinstance(unused, dict):
        return []
    # The server's words are not printed as they come.
    return [
        f"round {int(number)}: upload not used: "
        + ("the deadline was over" if "deadline" in str(why) else "enough uploads had arrived")
        for number, why in list(unused.items())[:20]
        if re.fullmatch("[0-9]{1,9}", str(number))
    ]


def _enrolment_line(response: Mapping[str, Any]) -> str:
    ranks = RankType(response["attention"], response["feed_forward"])
    speed, held = response["tokens_per_second"], response["holdout"]
    parts = [
        f"joined with {counted(response['examples'], 'training row')}",
        *([f"{held:,} held out for evaluation"] if held else []),
        f"up to {ranks}",
        *([] if speed is None else [f"{speed:.0f} tokens/s"]),
    ]
    return ", ".join(parts) + "; waiting for the server"


def _evaluation_line(response: Mapping[str, Any]) -> str:
    number = response["round"]
    what = f"after round {number}" if number else "before training"
    loss = response["loss_total"] / max(response["loss_tokens"], 1)
    return f"evaluation {what}: loss {loss:.3f} on {counted(response['examples'], 'held-out row')}"


def join(address: str, config: NodeConfig, keys: NodeKey | None, print_line: Print) -> None:
    """Take part in the federation at ``address`` until it is finished, or interrupted.

    Raises:
        ConfigError: the address is not HOST:PORT, or this machine does not have the device.
        ProtocolError: the data cannot be used, an insecure server is not on this machine, or the
            server cannot be the right one.
        AdapterError: the folder for the finished adapter holds something else.
    """
    _check(address, config, keys)
    node = Node(config, print_line)
    print_line(f"{counted(len(node.rows), 'row')}, kept on this machine")
    for notice in (*node.rows.notices, *local_users.unguarded(local_users.NODE)):
        print_line(notice)
    logged = LoggedNode(node, print_line)
    with scratch() as sockets:
        worker = Worker(sockets / "worker", logged.handle, config.limits.message_bytes)
        home = config.state / "flower"
        process = supernode(address, home, sockets / "worker", keys, config.limits.message_bytes)
        threading.Thread(target=worker.serve, daemon=True).start()
        try:
            Connection(address, keys, process, logged).run()
        finally:
            process.stop()
            worker.close()
    for line in _last_lines(logged.adapter, config):
        print_line(line)


def _check(address: str, config: NodeConfig, keys: NodeKey | None) -> None:
    """Refuse what can be seen to be wrong before anything is read or started."""
    preflight.check_address(address, insecure=keys is None)
    _check_device(config.device)
    peft_format.check_target(config.adapter, replace=True)


def _check_device(name: str) -> None:
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(
            f"--device is {name!r}, but PyTorch finds no CUDA device on this machine; join with "
            "--device cpu."
        )
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(
            f"--device is {name!r}, which PyTorch cannot use on this machine; join with --device "
            "cpu, or another device that it has, such as cuda:0."
        ) from error


def _last_lines(adapter: Mapping[str, Any], config: NodeConfig) -> list[str]:
    """What is printed at the end of a federation."""
    if not adapter:
        return ["the federation is finished; this client took no part in it and gets no adapter"]
    same = "the same file as the server's"
    if config.own_rank:
        same = "of the server's, which was truncated to your rank"
    return [
        f"the federation is finished: {counted(adapter['rounds'], 'round')}",
        f"adapter: {config.adapter}",
        f"SHA-256: {adapter['digest']} ({same})",
        f"load it with PEFT: {finished.loading(adapter['base'], str(config.adapter))}",
    ]


@dataclass
class Connection:
    """Keeps a SuperNode connected to the server, and prints in words what is wrong."""

    address: str
    keys: NodeKey | None
    process: Process
    node: LoggedNode
    _was_connected: bool = field(default=False, init=False)
    _printed: str = field(default="", init=False)
    _printed_at: float = field(default=0.0, init=False)
    _refused: str | None = field(default=None, init=False)

    def run(self) -> None:
        """Start the SuperNode, and again whenever it ends, until the run is over.

        Raises:
            ProtocolError: the server cannot be the right one.
        """
        pause = _FIRST_PAUSE_SECONDS
        while True:
            fault = self._fault()
            if fault is None:
                started = time.monotonic()
                if self._is_over_at_end():
                    return
                if time.monotonic() - started > _LONGEST_PAUSE_SECONDS:
                    pause = _FIRST_PAUSE_SECONDS
                fault = self._fault(announce=False) or self._why_ended()
            self._print(f"{fault.sentence} Trying again in {pause:.0f} s.")
            time.sleep(pause)
            if self._was_connected:
                # After a crash the server counts the node as online for about a minute, and does
                # not accept it before.
                pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)

    def _fault(self, announce: bool = True) -> Fault | None:
        """What keeps this client from taking part; None if nothing does."""
        greeting = preflight.greet(self.address, self.keys)
        if isinstance(greeting, Fault):
            if greeting.is_final and not self._was_connected:
                raise ProtocolError(greeting.sentence)
            return greeting
        self._was_connected = True
        if announce:
            self._print(f"connected to {self.address}; waiting for the server's first request ...")
            for note in greeting.notes:
                self._print(note)
        return None

    def _is_over_at_end(self) -> bool:
        """Run the SuperNode until it ends or the run is over; returns whether it is over."""
        self.process.start()
        probed_at = time.monotonic()
        stored_at: float | None = None
        while self.process.ended is None:
            if self.node.ended.wait(_LOOK_SECONDS):
                time.sleep(_LOOK_SECONDS)  # the answer to the last message is on its way
                return True
            now = time.monotonic()
            if self.node.adapter and stored_at is None:
                stored_at = now
            if stored_at is not None and now - stored_at > _LAST_SECONDS:
                return True
            self._print_refusal()
            if now - probed_at > _PROBE_SECONDS:
                probed_at = now
                self._probe()
        return bool(self.node.adapter)

    def _print_refusal(self) -> None:
        """Print once what the SuperNode refuses of the server's, as it goes on refusing it."""
        sentence = refusal(self.process.log.parent)
        if sentence is not None and sentence != self._refused:
            self._refused = sentence
            self.node.print_line(f"refused: {sentence}")

    def _probe(self) -> None:
        """Print that the server is away, or is back; the SuperNode goes on trying by itself."""
        fault = preflight.unreachable(self.address)
        if fault is not None:
            self._print(f"{fault.sentence} Waiting until it does.")
        elif self._printed.endswith("Waiting until it does."):
            self._print(f"the server at {self.address} answers again")

    def _why_ended(self) -> Fault:
        """A sentence on why the SuperNode ended although the server accepts this client's key."""
        if self.process.ended == _REJECTED:
            return Fault(
                "The server still counts this client as online, as it does for about a minute "
                "after a crash."
            )
        return Fault(
            f"Flower's SuperNode ended with code {self.process.ended}; see {self.process.log}."
        )

    def _print(self, line: str) -> None:
        """Print a line, unless it is the last one and was printed recently."""
        now, text = time.monotonic(), line.partition(" Trying again")[0]
        if text == self._printed and now - self._printed_at < _REMIND_SECONDS:
            return
        self._printed, self._printed_at = text, now
        self.node.print_line(line)
