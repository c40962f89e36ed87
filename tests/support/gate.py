"""A gate in a process of its own before a SuperLink that only records, and nodes that sign."""

import base64
import contextlib
import http.client
import http.server
import os
import socket
import ssl
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from flexlora.deployment.keys import fingerprint
from flexlora.deployment.server.run_files import NODES, NUMBERS, write_numbers


@dataclass
class SuperLink:
    """A stand-in that records what reaches it, and answers as it is told."""

    url: str = ""
    seen: list = field(default_factory=list)
    answer: object = None
    arriving: threading.Event = field(default_factory=threading.Event)
    reading: int = 0

    @property
    def port(self):
        return int(self.url.rpartition(":")[2])


@contextlib.contextmanager
def standing_in(keys=None):
    link = SuperLink()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def body(self):
            left, parts = int(self.headers["content-length"]), []
            while left and (part := self.rfile.read1(left)):
                link.arriving.set()
                parts.append(part)
                left -= len(part)
            return b"".join(parts)

        def do(self):
            link.reading += 1
            try:
                body = self.body()
            finally:
                link.reading -= 1
            link.seen.append((self.command, self.path, self.headers.items(), body))
            if link.answer is not None:
                return link.answer(self)
            self.send_response(200)
            self.send_header("content-type", "application/x-protobuf")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = do_PUT = do_DELETE = do

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.handle_error = lambda *_: None
    if keys is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(keys.certificate, keys.key)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    link.url = f"http{'s' if keys else ''}://127.0.0.1:{server.server_port}"
    try:
        yield link
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def awaited(path, process, seconds=30):
    until = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, "the process ended early"
        assert time.monotonic() < until, f"no {path} after {seconds} s"
        time.sleep(0.05)
    return path.read_text().strip()


WITH_TIMES = """
from dataclasses import replace
from flexlora.deployment.flower import connections, gate, gate_rules

limits = connections.ConnectionLimits(handshake_seconds={0}, headers_seconds={0})
connections.ConnectionLimits.of_process = staticmethod(lambda: limits)
gate.RequestLimits = lambda: gate_rules.RequestLimits(window_seconds={0})
gate.main()
"""


@contextlib.contextmanager
def gate_process(folder, *options, **environment):
    """The address of a gate with these options."""
    with started_gate(folder, *options, **environment) as (address, _):
        yield address


@contextlib.contextmanager
def started_gate(folder, *options, log=None, limits=None, times=None, **environment):
    """The address of a gate with these options, and its process; with other times of waiting."""
    ready = folder / "ready"
    program = ["-m", "flexlora.deployment.flower.gate"]
    if times is not None:
        program = ["-c", WITH_TIMES.format(times)]
    command = [sys.executable, *program, *map(str, options)]
    process = subprocess.Popen(
        [*command, "--listen", "127.0.0.1:0", "--ready", str(ready)],
        env={**os.environ, **environment},
        stderr=log,
        preexec_fn=limits,
    )
    try:
        yield awaited(ready, process), process
    finally:
        process.terminate()
        process.wait(15)
    assert (process.returncode, ready.exists()) == (0, False)


def split(door):
    host, _, port = door.partition(":")
    return host, int(port)


def connect(door, keys):
    host, _, port = door.partition(":")
    context = ssl.create_default_context(cafile=keys.ca)
    link = http.client.HTTPSConnection(host, int(port), context=context, timeout=20)
    return contextlib.closing(link)


def say(door, keys, raw):
    """Send bytes as they are; returns the status line and all that follows."""
    host, _, port = door.partition(":")
    context = ssl.create_default_context(cafile=keys.ca)
    with (
        socket.create_connection((host, int(port)), timeout=20) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as link,
    ):
        heard = b""
        with contextlib.suppress(OSError):  # what is refused is not read to its end
            link.sendall(raw)
        with contextlib.suppress(OSError):
            while chunk := link.recv(65536):
                heard += chunk
        return heard


@dataclass
class Signer:
    """A node's key, and the headers with which Flower's node signs a request."""

    key: ec.EllipticCurvePrivateKey = field(
        default_factory=lambda: ec.generate_private_key(ec.SECP384R1())
    )

    def public_key(self):
        """The public key in the form of Flower's requests."""
        return self.key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )

    def headers(self, seconds_ago=0.0, key=None):
        """The headers of a request that is signed so long ago, by this key or another."""
        time = (datetime.now(UTC) - timedelta(seconds=seconds_ago)).isoformat()
        signature = (key or self.key).sign(time.encode(), ec.ECDSA(hashes.SHA256()))
        return {
            "content-type": "application/protobuf",
            "flwr-public-key": base64.b64encode(self.public_key()).decode(),
            "flwr-timestamp": time,
            "flwr-signature": base64.b64encode(signature).decode(),
        }


def registering(folder: Path, *signers: Signer) -> Path:
    """A run's folder in which these nodes are registered."""
    folder.mkdir(exist_ok=True)
    prints, public = [], folder / "public.pub"
    for signer in signers:
        public.write_bytes(
            signer.key.public_key().public_bytes(
                serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
            )
        )
        prints.append(fingerprint(public))
    write_numbers(folder, NUMBERS, {p: n for n, p in enumerate(prints, 7)})
    write_numbers(folder, NODES, {f"n{n}": n for n, _ in enumerate(prints, 7)})
    return folder


def resident(pid: int) -> int:
    """The bytes of memory that a process uses now."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
