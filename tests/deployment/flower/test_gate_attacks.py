"""What somebody without a key can cost the gate, over real sockets, and what a node with one can.

Meanwhile a registered node's requests are answered, with a connection of their own each time: from
the attacker's own address, the worst case.
"""

import contextlib
import http.client
import json
import socket
import ssl
import threading
import time
from dataclasses import dataclass, field

import pytest

pytest.importorskip("flwr", reason="needs the extra 'flower'")

from flexlora.deployment.certificates import make_server
from support.gate import (
    Signer,
    registering,
    resident,
    say,
    split,
    standing_in,
    started_gate,
)

resource = pytest.importorskip("resource", reason="Windows has no limit of descriptors")
PULL, PUSH = "/v1/fleet/pull-messages", "/v1/fleet/push-object"
MIB = 2**20
SETTLE_SECONDS = 0.3


@dataclass
class Front:
    """A gate before a SuperLink that records, with one registered node."""

    address: str
    process: object
    keys: object
    link: object
    node: Signer
    log: object
    opened: list = field(default_factory=list)

    def plain(self, source="127.0.0.1"):
        connection = socket.create_connection(split(self.address), 20, (source, 0))
        self.opened.append(connection)
        return connection

    def tls(self, source="127.0.0.1"):
        context = ssl.create_default_context(cafile=self.keys.ca)
        connection = context.wrap_socket(self.plain(source), server_hostname="localhost")
        self.opened.append(connection)
        return connection

    def request(self, path=PULL, body=b"x", headers=None, method="POST"):
        """The status and the body of the answer to a registered node's request."""
        headers = self.node.headers() if headers is None else headers
        with contextlib.closing(self.connected()) as connection:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.read()

    def connected(self):
        context = ssl.create_default_context(cafile=self.keys.ca)
        return http.client.HTTPSConnection(*split(self.address), timeout=20, context=context)

    def memory(self):
        return resident(self.process.pid)

    def lines(self):
        return self.log.read_text().splitlines()


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    return make_server(tmp_path_factory.mktemp("keys") / "server", [])


@contextlib.contextmanager
def fronting(folder, keys, limits=None, run=True, times=None):
    node = Signer()
    registering(folder / "run", node)
    files = ("--ca", keys.ca, "--cert", keys.certificate, "--key", keys.key)
    options = (*files, *(("--run", folder / "run") if run else ()))
    log = folder / "gate.log"
    with contextlib.ExitStack() as stack:
        link = stack.enter_context(standing_in(keys))
        stream = stack.enter_context(log.open("wb"))
        address, process = stack.enter_context(
            started_gate(
                folder, "--upstream", link.url, *options, log=stream, limits=limits, times=times
            )
        )
        front = Front(address, process, keys, link, node, log)
        try:
            assert front.request()[0] == 200
            link.seen.clear()
            link.arriving.clear()
            yield front
        finally:
            for connection in front.opened:
                connection.close()


@pytest.fixture(scope="module")
def shared(tmp_path_factory, keys):
    with fronting(tmp_path_factory.mktemp("front"), keys) as front:
        yield front


@pytest.fixture
def front(shared):
    until = time.monotonic() + 5
    while shared.link.reading and time.monotonic() < until:  # bodies that the last test broke off
        time.sleep(0.01)
    shared.link.seen.clear()
    shared.link.arriving.clear()
    shared.link.answer = None
    yield shared
    for connection in shared.opened:
        connection.close()
    shared.opened.clear()


@contextlib.contextmanager
def working(front, seconds=0.2):
    """A registered node asks again and again; every request must be answered."""
    answers, over = [], threading.Event()

    def ask():
        while not over.is_set():
            try:
                answers.append(front.request()[0])
            except OSError as error:
                answers.append(repr(error))
            over.wait(seconds)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield answers
    finally:
        over.set()
        thread.join()
    assert answers and set(answers) == {200}, answers


def head(path=PUSH, length=60 * MIB, headers=None):
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Length: {length}"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    return "\r\n".join([*lines, "", ""]).encode()


def pushed(connection, most, piece=2**18):
    """How many bytes of a body the gate takes, and the seconds until it closes."""
    started, sent = time.monotonic(), 0
    connection.settimeout(5)
    with contextlib.suppress(OSError):
        while sent < most:
            connection.sendall(b"x" * min(piece, most - sent))
            sent += piece
    with contextlib.suppress(OSError):
        while connection.recv(65536):
            pass
    return sent, time.monotonic() - started


# Bodies

STRANGERS = {
    "no headers": lambda node: {},
    "another key": lambda node: Signer().headers(),
    "another's signature": lambda node: node.headers(key=Signer().key),
    "an old signature": lambda node: node.headers(seconds_ago=306),
    "a signature of the future": lambda node: node.headers(seconds_ago=-30),
    "no time zone": lambda node: {**node.headers(), "flwr-timestamp": "2026-01-01T00:00:00"},
    "no time": lambda node: {**node.headers(), "flwr-timestamp": "9" * 39},
    "no base64": lambda node: {**node.headers(), "flwr-signature": "!!!!"},
    "no signature": lambda node: {**node.headers(), "flwr-signature": ""},
    "an empty key": lambda node: {**node.headers(), "flwr-public-key": ""},
    "no key": lambda node: {**node.headers(), "flwr-public-key": "AAAA"},
    "a huge key": lambda node: {**node.headers(), "flwr-public-key": "A" * 9000},
    "a huge signature": lambda node: {**node.headers(), "flwr-signature": "A" * 9000},
}


@pytest.mark.parametrize("kind", STRANGERS)
def test_a_body_without_a_key_is_refused_from_its_headers(front, kind):
    """Of a size that a node may send, so that only the key is missing; its body never comes."""
    with contextlib.closing(front.tls()) as connection:
        connection.sendall(head(length=5 * MIB, headers=STRANGERS[kind](front.node)))
        connection.settimeout(2)
        heard = connection.recv(65536)
    assert heard.startswith(b"HTTP/1.1 401 "), heard
    assert b"connection: close" in heard
    assert not front.link.seen and not front.link.arriving.is_set()


def test_an_unknown_key_is_not_activated_in_words_that_flowers_node_prints(front):
    status, body = front.request("/v1/fleet/activate-node", headers=Signer().headers())
    assert (status, json.loads(body)["code"]) == (412, 412)
    assert json.loads(body)["detail"].startswith("Failed to activate: ")


def test_a_header_that_comes_twice_is_no_signature(front):
    signed = front.node.headers()
    for name in ("flwr-public-key", "flwr-timestamp", "flwr-signature"):
        twice = head(PULL, 1, {**signed, name.title(): signed[name]}) + b"x"
        assert say(front.address, front.keys, twice).startswith(b"HTTP/1.1 401 ")
    assert not front.link.seen


def test_a_signature_serves_once(front):
    signed = front.node.headers()
    assert front.request(headers=signed)[0] == 200
    status, body = front.request(path=PUSH, body=b"another", headers=signed)
    assert (status, b"used before" in body) == (503, True)  # Flower's node signs anew after 503
    assert len(front.link.seen) == 1


@pytest.mark.slow
def test_a_revoked_node_is_refused_from_then_on(tmp_path, keys):
    with fronting(tmp_path, keys) as front:
        registering(tmp_path / "run")
        assert front.request()[0] == 401
        registering(tmp_path / "run", front.node)
        assert front.request()[0] == 200
        (tmp_path / "run" / "nodes.json").write_text('{"n7"')  # a disk that damaged it
        assert front.request()[0] == 200


@pytest.mark.parametrize("length", [5 * MIB, 2**10, pytest.param(60 * MIB, marks=pytest.mark.slow)])
def test_many_bodies_without_a_key_cost_nothing(front, length):
    """Twelve, whose last byte is held back."""
    before = front.memory()
    with working(front):
        for _ in range(12):
            connection = front.tls()
            connection.settimeout(2)
            with contextlib.suppress(OSError):
                connection.sendall(head(length=length) + b"x" * (length - 1))
        time.sleep(SETTLE_SECONDS)
        grown = front.memory() - before
    assert grown < 12 * MIB
    assert {path for _, path, *_ in front.link.seen} == {PULL}


@pytest.mark.parametrize("signed", [False, True], ids=["a stranger", "a node"])
@pytest.mark.parametrize("form", ["Content-Length: 1073741824", "Transfer-Encoding: chunked"])
def test_a_body_of_a_gigabyte_is_not_read(front, form, signed):
    before = front.memory()
    headers = front.node.headers() if signed else {}
    lines = [f"POST {PUSH} HTTP/1.1", "Host: localhost", form]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    with contextlib.closing(front.tls()) as connection:
        connection.sendall("\r\n".join([*lines, "", ""]).encode())
        sent, seconds = pushed(connection, 2**30)
    assert sent < 16 * MIB and seconds < 1
    assert front.memory() - before < 16 * MIB


def test_a_body_that_goes_on_after_its_length_is_another_request(front):
    with contextlib.closing(front.tls()) as connection:
        connection.sendall(head(PULL, 1, front.node.headers()) + b"x")
        sent, _ = pushed(connection, 2**30)
    assert sent < 16 * MIB


def test_nothing_is_expected_of_a_stranger(front):
    with contextlib.closing(front.tls()) as connection:
        connection.sendall(head(length=100, headers={"Expect": "100-continue"}))
        connection.settimeout(2)
        assert connection.recv(999).startswith(b"HTTP/1.1 401 ")
    with contextlib.closing(front.tls()) as connection:
        signed = {**front.node.headers(), "Expect": "100-continue"}
        connection.sendall(head(PULL, 1, headers=signed))
        connection.settimeout(5)
        assert connection.recv(999).startswith(b"HTTP/1.1 100 ")
        connection.sendall(b"x")
        assert connection.recv(999).startswith(b"HTTP/1.1 200 ")


# Connections

IDLE = {
    "plain": lambda front, source: front.plain(source),
    "tls": lambda front, source: front.tls(source),
    "half a hello": lambda front, source: front.plain(source).sendall(b"\x16\x03\x01\x02\x00\x01"),
    "half headers": lambda front, source: front.tls(source).sendall(head()[:50]),
}


def besieged(front, kind, count, sources=("127.0.0.1",), most_growth=50 * MIB):
    """Open so many connections that do nothing, while a node works; returns the growth."""
    before = front.memory()
    with working(front):
        for number in range(count):
            with contextlib.suppress(OSError):
                IDLE[kind](front, sources[number % len(sources)])
        time.sleep(SETTLE_SECONDS)
        grown = front.memory() - before
    assert grown < most_growth
    return grown


@pytest.mark.parametrize(
    "kind", ["plain", *(pytest.param(kind, marks=pytest.mark.slow) for kind in list(IDLE)[1:])]
)
def test_idle_connections_shut_nobody_out(tmp_path, keys, kind):
    """More than the descriptors of the process; nobody waits for a time-out."""

    def few_descriptors():
        resource.setrlimit(resource.RLIMIT_NOFILE, (400, 400))

    with fronting(tmp_path, keys, few_descriptors) as front:
        sources = [f"127.0.0.{2 + n % 80}" for n in range(160)]
        besieged(front, kind, 250)
        besieged(front, kind, 250, sources)


def test_a_connection_that_says_nothing_is_closed(tmp_path, keys):
    """Plain, with half a TLS hello, after it, and with half its headers; a byte now and then too.

    With a second in place of the ten, and of the twenty for a body.
    """
    with fronting(tmp_path, keys, times=1.0) as front:
        started = time.monotonic()
        waiting = [front.plain(), front.tls(), front.plain(), front.tls(), front.tls()]
        waiting[2].sendall(b"\x16\x03\x01\x02\x00\x01")
        waiting[3].sendall(head()[:50])
        waiting[4].sendall(head(length=100, headers=front.node.headers()))
        closed, heard = {}, {}
        while len(closed) < 5 and time.monotonic() - started < 10:
            for number, connection in enumerate(waiting):
                connection.settimeout(0.05)
                try:
                    if number > 2:
                        connection.sendall(b"x")
                    if number in closed or (got := connection.recv(999)):
                        heard.setdefault(number, got)
                        continue
                except TimeoutError:
                    continue
                except OSError:
                    pass
                closed.setdefault(number, time.monotonic() - started)
        assert set(closed) == {0, 1, 2, 3, 4}
        assert min(closed.values()) > 0.8 and max(closed.values()) < 4, closed
        assert heard[4].startswith(b"HTTP/1.1 408 ")


def test_connections_of_nodes_are_kept(front):
    """A registered node's connection outlasts any number of strangers' that come after it."""
    with contextlib.closing(front.connected()) as connection:
        for _ in range(3):
            connection.request("POST", PULL, b"x", front.node.headers())
            answer = connection.getresponse()
            assert (answer.status, answer.read()) == (200, b"x")
            for _ in range(100):
                front.plain()
            time.sleep(SETTLE_SECONDS)


@pytest.mark.slow
def test_one_node_has_so_many_connections(front):
    """A node cannot fill the gate either: its oldest idle connection makes room."""
    held = [front.connected() for _ in range(40)]
    for connection in held:
        connection.request("POST", PULL, b"x", front.node.headers())
        assert connection.getresponse().read() == b"x"
    held[0].sock.settimeout(5)
    assert held[0].sock.recv(1) == b""
    for connection in held:
        connection.close()


def test_a_node_holds_back_so_many_bodies(front):
    """With a key: three objects at a time are on their way, the others wait unread."""
    for _ in range(6):
        connection = front.tls()
        connection.settimeout(0.3)
        with contextlib.suppress(OSError):
            connection.sendall(
                head(length=5 * MIB, headers=front.node.headers()) + b"x" * (5 * MIB - 1)
            )
    with working(front):
        time.sleep(SETTLE_SECONDS)
        reading = []
        for _ in range(20):  # now and then the body of the working node is among them
            time.sleep(0.02)
            reading.append(front.link.reading)
        assert min(reading) == 3 and max(reading) <= 4


# Other bytes


def test_bytes_that_are_no_request(front):
    kinds = {
        "h2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0" * 30,
        "a long line": b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n",
        "a long header": b"GET / HTTP/1.1\r\nA: " + b"a" * 100_000,
        "many headers": b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 50_000,
        "folded": b"GET / HTTP/1.1\r\nHost: a\r\n" + b" b\r\n" * 50_000,
        "zeros": b"\0" * 100_000,
        "escapes": b"\x1b[31m\r\n\r\n",
    }
    before = front.memory()
    with working(front):
        for sent in kinds.values():
            heard = say(front.address, front.keys, sent)
            assert heard == b"" or heard.split(b" ")[1] in (b"400", b"403", b"405", b"431"), heard
            with contextlib.closing(front.plain()) as connection, contextlib.suppress(OSError):
                connection.sendall(sent)
    assert front.memory() - before < 8 * MIB
    assert {path for _, path, *_ in front.link.seen} <= {PULL, PUSH}


def test_a_pipeline_ends_at_its_first_refusal(front):
    refused = head("/v1/control/start-run", 0)
    heard = say(front.address, front.keys, refused * 1000)
    assert heard.count(b"HTTP/1.1 ") == 1 and heard.startswith(b"HTTP/1.1 403 ")
    signed = b"".join(head(PULL, 1, front.node.headers()) + b"x" for _ in range(20))
    heard = say(front.address, front.keys, signed + refused + signed)
    assert heard.count(b"HTTP/1.1 200 ") == 20 and heard.count(b"HTTP/1.1 403 ") == 1
    assert {path for _, path, *_ in front.link.seen} == {PULL}


@pytest.mark.slow
def test_the_log_is_neither_filled_nor_forged(tmp_path, keys):
    with fronting(tmp_path, keys) as front:
        for number in range(110):
            path = f"/{number}%1b[31m" + "\\" * 500
            say(front.address, front.keys, head(path, 0))
        say(front.address, front.keys, b"\x1b]0;x\x07\r\n\r\n" * 9)
        lines = front.lines()
    assert 50 < len(lines) < 110
    assert max(map(len, lines)) < 400
    assert all(line.isascii() and line.isprintable() for line in lines)


def test_a_hello_costs_little_and_fills_no_console(front, tmp_path_factory):
    run = front.log.parent / "run"
    with working(front):
        for number in range(60):
            key = f"SHA256:{number:043d}"
            head_ = f"GET /v1/flexlora/hello HTTP/1.1\r\nHost: a\r\nflexlora-key: {key}\r\n\r\n"
            heard = say(front.address, front.keys, head_.encode() * 3)
            assert heard.count(b"HTTP/1.1 200 ") == 1
    assert len((run / "arrivals.log").read_text().splitlines()) <= 2
