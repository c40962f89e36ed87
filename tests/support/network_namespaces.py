"""Machines of a federation as network namespaces on this one, joined by cables that can be cut.

Each machine has its own addresses, ports and loopback; files are shared. Needs root on Linux.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

SERVER = "server"
SERVER_HOST = "10.83.0.1"
_BRIDGE = "switch"
_SLOW = "2mbit"


def missing_for_networks() -> str | None:
    """Why machines cannot be made here; None where they can."""
    return _missing("ip") or _failing("unshare", "--net", "ip", "link", "set", "lo", "up")


def missing_for_disks() -> str | None:
    """Why a process cannot have a disk of its own here; None where it can."""
    return _missing("unshare") or _failing(
        *("unshare", "--mount", "mount", "-t", "tmpfs", "-o", "size=64k", "none", "/tmp")
    )


def _missing(program: str) -> str | None:
    if sys.platform != "linux":
        return "namespaces are Linux's"
    if os.geteuid() != 0:
        return "only root can make namespaces"
    return None if shutil.which(program) else f"the program {program} is not installed"


def _failing(*command: str) -> str | None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return f"{' '.join(command)}: {done.stderr.strip()}" if done.returncode else None


def ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"
    return done.stdout


@dataclass(frozen=True)
class Network:
    """A server's machine with a switch, and a machine for each client on a cable of its own."""

    clients: Sequence[str]
    mark: str

    def name(self, machine: str) -> str:
        """The namespace of a machine."""
        return f"flexlora-{self.mark}-{machine}"

    def within(self, machine: str) -> list[str]:
        """The beginning of a command that is to run on a machine."""
        return ["ip", "netns", "exec", self.name(machine)]

    def host(self, client: str) -> str:
        """A client's address."""
        return f"10.83.0.{11 + self.clients.index(client)}"

    def make(self) -> None:
        for machine in (SERVER, *self.clients):
            ip("netns", "add", self.name(machine))
            ip("-n", self.name(machine), "link", "set", "lo", "up")
        server = self.name(SERVER)
        ip("-n", server, "link", "add", _BRIDGE, "type", "bridge")
        ip("-n", server, "address", "add", f"{SERVER_HOST}/24", "dev", _BRIDGE)
        ip("-n", server, "link", "set", _BRIDGE, "up")
        for client in self.clients:
            there = self.name(client)
            ends = ["type", "veth", "peer", "name", "cable", "netns", there]
            ip("-n", server, "link", "add", client, *ends)
            ip("-n", server, "link", "set", client, "master", _BRIDGE, "up")
            ip("-n", there, "address", "add", f"{self.host(client)}/24", "dev", "cable")
            ip("-n", there, "link", "set", "cable", "up")

    def remove(self) -> None:
        for machine in (SERVER, *self.clients):
            subprocess.run(["ip", "netns", "del", self.name(machine)], check=False)

    def slow_down(self, client: str) -> None:
        """Make a client's line a slow one, with a short queue that drops what it cannot hold."""
        line = f"qdisc add dev cable root tbf rate {_SLOW} burst 16kb latency 60ms"
        tc = ["tc", "-n", self.name(client), *line.split()]
        if shutil.which("tc") is not None:
            subprocess.run(tc, check=True)

    @contextlib.contextmanager
    def cut(self, client: str) -> Iterator[None]:
        """Unplug a client's cable for a while."""
        ip("-n", self.name(SERVER), "link", "set", client, "down")
        try:
            yield
        finally:
            ip("-n", self.name(SERVER), "link", "set", client, "up")

    def listening(self, machine: str) -> list[int]:
        """The TCP ports on which anything listens on a machine, on whatever address."""
        told = self._run(machine, "import sys; print(open('/proc/self/net/tcp').read())")
        rows = [line.split() for line in told.splitlines()[1:] if line.strip()]
        return sorted({int(row[1].rpartition(":")[2], 16) for row in rows if row[3] == "0A"})

    def open_ports(self, machine: str, host: str) -> list[int]:
        """The TCP ports of an address, of all that there are, that a machine can connect to."""
        return json.loads(self._run(machine, _SCAN.format(host=host)))

    def _run(self, machine: str, code: str) -> str:
        command = [*self.within(machine), sys.executable, "-c", code]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


# A closed port refuses at once. On a slow line packets are dropped, so that a probe without any
# answer says nothing: it is sent again, and a port that never answers counts as open.
_SCAN = """
import errno
import socket

def refuses(port):
    for _ in range(5):
        with socket.socket() as probe:
            probe.settimeout(4)
            answer = probe.connect_ex(({host!r}, port))
        if answer in (0, errno.ECONNREFUSED):
            return answer != 0
    return False

print([port for port in range(1, 65536) if not refuses(port)])
"""


@contextlib.contextmanager
def network(clients: Sequence[str]) -> Iterator[Network]:
    """A network for as long as it is needed; what runs in it must have ended by then."""
    made = Network(tuple(clients), str(os.getpid()))
    try:
        made.make()
        yield made
    finally:
        made.remove()


def with_disk(folder: Path, mebibytes: int) -> list[str]:
    """The beginning of a command for which ``folder`` is a disk of its own, of this size."""
    mount = f'mount -t tmpfs -o size={mebibytes}m,mode=700 none "$0" && exec "$@"'
    return ["unshare", "--mount", "sh", "-c", mount, str(folder)]


def seen_by(pid: int, path: Path) -> Path:
    """A path as a process sees it that has disks of its own."""
    return Path(f"/proc/{pid}/root{path}")


def fill(disk: Path) -> Path:
    """Fill a disk with a file, to the last byte."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass
    return filler
