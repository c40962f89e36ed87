"""Flower's SuperLink behind the gate, as `flexlora serve` starts both, under what strangers send.

The memory of both processes together grows by less than 50 MiB, and a registered node's heartbeat,
on a new connection every second, is answered throughout.
"""

import contextlib
import http.client
import socket
import ssl
import threading
import time
from dataclasses import dataclass, field

import pytest

pytest.importorskip("flwr", reason="needs the extra 'flower'")

from flwr.proto.fleet_pb2 import ActivateNodeRequest, ActivateNodeResponse
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest, SendNodeHeartbeatResponse
from flwr.proto.node_pb2 import Node

from flexlora.deployment import keys
from flexlora.deployment.certificates import make_server
from flexlora.deployment.flower.processes import free_port
from flexlora.deployment.key_files import read_private_key
from flexlora.deployment.server import supervisor
from flexlora.deployment.server.supervisor import Listening
from support.gate import Signer, resident

resource = pytest.importorskip("resource", reason="Windows has no limit of descriptors")
MIB = 2**20
MOST_GROWTH = 50 * MIB


@dataclass
class Site:
    """A served run's processes, and its one node."""

    server: supervisor.Server
    address: tuple
    ca: object
    node: Signer
    number: int = 0
    opened: list = field(default_factory=list)

    def memory(self):
        processes = (self.server.gate, self.server.link.process)
        return sum(resident(process._running.pid) for process in processes)

    def context(self):
        return ssl.create_default_context(cafile=self.ca)

    def ask(self, call, request, answer):
        connection = http.client.HTTPSConnection(*self.address, timeout=20, context=self.context())
        with contextlib.closing(connection):
            body = request.SerializeToString()
            connection.request("POST", f"/v1/fleet/{call}", body, self.node.headers())
            response = connection.getresponse()
            content = response.read()
        assert response.status == 200, (response.status, content)
        return answer.FromString(content)

    def beat(self):
        request = SendNodeHeartbeatRequest(node=Node(node_id=self.number), heartbeat_interval=60)
        assert self.ask("send-node-heartbeat", request, SendNodeHeartbeatResponse).success

    def plain(self, source="127.0.0.1"):
        connection = socket.create_connection(self.address, 20, (source, 0))
        self.opened.append(connection)
        return connection

    def tls(self, source="127.0.0.1"):
        context = self.shared_context
        connection = context.wrap_socket(self.plain(source), server_hostname="localhost")
        self.opened.append(connection)
        return connection

    @property
    def shared_context(self):
        if not hasattr(self, "_context"):
            self._context = self.context()
        return self._context


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("siege")
    made = make_server(folder / "keys", [])
    keys.make_node(folder / "ash", "ash")
    (folder / "keys" / keys.NODES).mkdir(mode=0o700)
    keys.admit(folder / "keys", folder / "ash" / "ash.pub")
    port, run = free_port(), folder / "run"
    run.mkdir()
    server = supervisor.Server(run, Listening("127.0.0.1", port, folder / "keys"))
    server.link.start()
    server.update_nodes()
    server.gate.start()
    node = Signer(read_private_key(folder / "ash" / "ash.key", openssh=True))
    site = Site(server, ("127.0.0.1", port), made.ca, node)
    try:
        until = time.monotonic() + 30
        while not site.number:
            assert time.monotonic() < until
            with contextlib.suppress(OSError):
                public = node.public_key()
                request = ActivateNodeRequest(public_key=public, heartbeat_interval=60)
                site.number = site.ask("activate-node", request, ActivateNodeResponse).node_id
            time.sleep(0.2)
        for _ in range(20):
            site.beat()
        yield site
    finally:
        server.gate.stop()
        server.link.process.stop()


@contextlib.contextmanager
def besieged(site):
    """Beats once a second; afterwards every beat was answered, and the memory has not grown."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    before, most, failed, over = site.memory(), [0], [], threading.Event()
    slowest, count = [0.0], [0]

    def beat():
        while not over.wait(1):
            started = time.monotonic()
            try:
                site.beat()
                count[0] += 1
            except (OSError, AssertionError, http.client.HTTPException) as error:
                failed.append(repr(error))
            slowest[0] = max(slowest[0], time.monotonic() - started)

    def watch():
        while not over.wait(0.2):
            most[0] = max(most[0], site.memory() - before)

    threads = [threading.Thread(target=each) for each in (beat, watch)]
    for thread in threads:
        thread.start()
    try:
        yield
        time.sleep(3)
    finally:
        over.set()
        for thread in threads:
            thread.join()
        for connection in site.opened:
            connection.close()
        site.opened.clear()
    print(f"\n+{most[0] / MIB:.1f} MiB, {count[0]} beats, the slowest {slowest[0]:.2f} s")
    assert not failed and count[0] >= 2
    assert most[0] < MOST_GROWTH


def head(length, headers=(), call="push-object"):
    lines = [f"POST /v1/fleet/{call} HTTP/1.1", "Host: localhost", f"Content-Length: {length}"]
    lines += [f"{name}: {value}" for name, value in dict(headers).items()]
    return "\r\n".join([*lines, "", ""]).encode()


@pytest.mark.parametrize(
    ("key", "length"),
    [
        pytest.param("none", 60 * MIB, marks=pytest.mark.slow),
        pytest.param("none", 5 * MIB, marks=pytest.mark.trust),
        pytest.param("another", 60 * MIB, marks=pytest.mark.trust),
        pytest.param("another", 5 * MIB, marks=pytest.mark.slow),
    ],
)
def test_twelve_bodies_without_a_key(site, length, key):
    with besieged(site):
        for _ in range(12):
            headers = {"content-type": "application/protobuf"}
            if key == "another":
                headers = Signer().headers()
            connection = site.tls()
            connection.settimeout(3)
            with contextlib.suppress(OSError):
                connection.sendall(head(length, headers) + b"x" * (length - 1))


ONE, MANY = ["127.0.0.1"], [f"127.0.{n // 250}.{1 + n % 250}" for n in range(1, 1051)]
IDLE = {
    "plain": lambda site, source: site.plain(source),
    "tls": lambda site, source: site.tls(source),
    "half a hello": lambda site, source: site.plain(source).sendall(b"\x16\x03\x01\x02\x00\x01"),
    "half headers": lambda site, source: site.tls(source).sendall(head(9)[:50]),
}


@pytest.mark.parametrize(
    ("kind", "sources"),
    [
        pytest.param(kind, sources, id=f"{kind}, {name}", marks=mark)
        for kind in IDLE
        for name, sources, mark in (
            ("one address", ONE, pytest.mark.slow if kind == "plain" else pytest.mark.trust),
            ("many addresses", MANY, pytest.mark.slow if kind == "tls" else pytest.mark.trust),
        )
    ],
)
def test_1050_idle_connections(site, kind, sources):
    with besieged(site):
        for number in range(1050):
            with contextlib.suppress(OSError):
                IDLE[kind](site, sources[number % len(sources)])


@pytest.mark.trust
def test_4150_tls_connections(site):
    with besieged(site):
        for _ in range(4150):
            with contextlib.suppress(OSError):
                site.tls()


@pytest.mark.trust
def test_handshakes_without_an_end(site):
    """Four threads that connect, greet and leave, as fast as they can."""
    with besieged(site):
        over = threading.Event()

        def churn(source):
            while not over.is_set():
                with contextlib.suppress(OSError):
                    plain = socket.create_connection(site.address, 20, (source, 0))
                    with contextlib.closing(plain):
                        site.shared_context.wrap_socket(plain, server_hostname="localhost").close()

        threads = [threading.Thread(target=churn, args=(source,)) for source in MANY[:3] + ONE]
        for thread in threads:
            thread.start()
        time.sleep(5)
        over.set()
        for thread in threads:
            thread.join()


@pytest.mark.trust
def test_requests_without_an_end(site):
    """Bad paths, unsigned calls and hellos, each on a connection of its own, as fast as can be."""
    asks = [
        head(0, call="../control/start-run"),
        head(5 * MIB),
        b"GET /v1/flexlora/hello HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET /" + b"\x1b" * 900 + b" HTTP/1.1\r\nHost: a\r\n\r\n",
    ]
    log = site.server.gate.log
    before = log.stat().st_size
    with besieged(site):
        until = time.monotonic() + 8
        while time.monotonic() < until:
            for ask in asks:
                with contextlib.suppress(OSError), contextlib.closing(site.tls()) as connection:
                    connection.sendall(ask)
                    while connection.recv(65536):
                        pass
            site.opened.clear()
    assert log.stat().st_size - before < 50_000
