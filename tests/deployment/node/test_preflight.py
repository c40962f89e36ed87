"""What is wrong between a client and its server, found out in one connection."""

import json
import shutil
import socket
import ssl
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from flexlora import __version__
from flexlora.deployment import certificates, keys
from flexlora.deployment.greeting import HELLO, KEY_HEADER, NAME_HEADER
from flexlora.deployment.node import preflight
from flexlora.deployment.node.preflight import Fault, Greeting


@pytest.fixture(scope="module")
def server_keys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("server") / "keys"
    return certificates.make_server(folder, [])


@pytest.fixture(scope="module")
def key(tmp_path_factory, server_keys):
    """A client's key, which trusts the server."""
    folder = tmp_path_factory.mktemp("client") / "keys"
    keys.make_node(folder, "ash")
    shutil.copy(server_keys.ca, folder / "ca.crt")
    return keys.NodeKey.of(folder)


@contextmanager
def listening(
    answer: bytes, status: int = 200, tls=None, host: str = "localhost", bind: str = "127.0.0.1"
):
    """The address of a server that gives this answer to a hello, with the headers it was sent."""
    heard = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            heard.append((self.path, dict(self.headers)))
            self.send_response(status)
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_):
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, *_):
            pass

    server = Server((bind, 0), Handler)
    if tls is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(tls.certificate, tls.key)
        server.socket = context.wrap_socket(
            server.socket, server_side=True, do_handshake_on_connect=False
        )
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"{host}:{server.server_port}", heard
    finally:
        server.shutdown()
        server.server_close()


def hello(**changes) -> bytes:
    facts = {"version": __version__, "key": "registered", "finished": False}
    return json.dumps({**facts, **changes}).encode()


def test_a_registered_client_is_greeted(server_keys, key):
    with listening(hello(), tls=server_keys) as (address, heard):
        assert preflight.greet(address, key) == Greeting()
    ((path, headers),) = heard
    assert path == HELLO
    assert headers[KEY_HEADER] == keys.fingerprint(key.key.with_suffix(".pub"))
    assert headers[NAME_HEADER] == "ash"


def test_the_private_key_is_not_sent(server_keys, key):
    secret = key.key.read_text().split("-----")[2].split()[3]
    with listening(hello(), tls=server_keys) as (address, heard):
        preflight.greet(address, key)
    assert secret not in str(heard)


def test_other_versions_and_a_finished_run_are_notes(server_keys, key):
    with listening(hello(version="99.1", finished=True), tls=server_keys) as (address, _):
        greeting = preflight.greet(address, key)
    assert "the server has flexlora 99.1, this client" in greeting.notes[0]
    assert greeting.notes[1] == "the federation is finished; asking for the adapter"


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ("unknown", "does not know the key of this client (yet): send ash.pub, whose fingerprint"),
        ("revoked", "The server's owner has revoked the key of this client, ash.key."),
    ],
)
def test_a_key_that_may_not_take_part_is_named_and_may_be_admitted_later(
    server_keys, key, state, words
):
    with listening(hello(key=state), tls=server_keys) as (address, _):
        fault = preflight.greet(address, key)
    assert words in fault.sentence and not fault.is_final
    if state == "unknown":
        assert keys.fingerprint(key.key.with_suffix(".pub")) in fault.sentence
        assert "flexlora keys DIR --add ash.pub" in fault.sentence


@pytest.mark.parametrize(
    ("answer", "status"),
    [(b"", 403), (b"<html>", 200), (b"[1]", 200), (b"\xff" * 5000, 200), (b"[" * 4000, 200)],
)
def test_what_is_not_the_gate_keeps_nobody_away(server_keys, key, answer, status):
    """Such as nginx, which has no answer to a hello."""
    with listening(answer, status, server_keys) as (address, _):
        assert preflight.greet(address, key) == Greeting()


def test_a_certificate_of_another_server_is_named(server_keys, key, tmp_path):
    other = certificates.make_server(tmp_path / "other", [])
    with listening(hello(), tls=other) as (address, heard):
        fault = preflight.greet(address, key)
    assert fault.is_final and "is not signed by your ca.crt" in fault.sentence and not heard


def test_a_certificate_for_another_host_is_named(server_keys, key):
    # All of 127.0.0.0/8 is this machine on Linux; elsewhere it may be one address alone.
    try:
        socket.create_server(("127.0.0.2", 0)).close()
    except OSError:
        pytest.skip("this machine has no address 127.0.0.2")
    with listening(hello(), tls=server_keys, host="127.0.0.2", bind="127.0.0.2") as (address, _):
        fault = preflight.greet(address, key)
    assert fault.is_final
    assert "The server's certificate does not name '127.0.0.2'" in fault.sentence


def test_a_server_without_tls_is_named(key):
    with listening(hello()) as (address, _):
        fault = preflight.greet(address, key)
    assert fault.is_final and "does not use TLS: it was started with --insecure" in fault.sentence


def test_a_server_with_tls_is_named_to_a_client_without(server_keys):
    with listening(hello(), tls=server_keys) as (address, _):
        fault = preflight.greet(address.replace("localhost", "127.0.0.1"), None)
    assert fault.is_final and "it was started with --keys. Join with --keys" in fault.sentence


def test_without_keys_a_server_without_tls_is_enough():
    with listening(b"", 404) as (address, _):
        assert preflight.greet(address.replace("localhost", "127.0.0.1"), None) == Greeting()


def test_a_host_of_no_such_name_is_named(monkeypatch, key):
    def unknown(*_):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(preflight.socket, "create_connection", unknown)
    fault = preflight.greet("servr.example:8090", key)
    assert fault.is_final and "no machine of the name 'servr.example'" in fault.sentence


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (socket.gaierror(socket.EAI_AGAIN, "Temporary failure"), "cannot be looked up now"),
        (TimeoutError(), "Nothing answers at host:8090 within 5 s"),
        (ConnectionRefusedError(), "Nothing listens at host:8090: `flexlora serve` is not"),
        (OSError(113, "No route to host"), "cannot be reached (No route to host)"),
    ],
)
def test_what_may_pass_is_tried_again(monkeypatch, key, error, words):
    def fails(*_):
        raise error

    monkeypatch.setattr(preflight.socket, "create_connection", fails)
    fault = preflight.greet("host:8090", key)
    assert isinstance(fault, Fault) and words in fault.sentence and not fault.is_final


def test_a_server_that_hangs_up_is_named(key):
    with socket.create_server(("127.0.0.1", 0)) as server:

        def hang_up():
            for _ in range(2):
                server.accept()[0].close()

        threading.Thread(target=hang_up, daemon=True).start()
        fault = preflight.greet(f"localhost:{server.getsockname()[1]}", key)
    assert isinstance(fault, Fault)
