"""Who reaches the SuperLink on loopback: the user who runs it, and nobody else."""

import asyncio
import os
import socket
import sys
from types import MethodType, SimpleNamespace

import pytest

pytest.importorskip("flwr", reason="needs flexlora[flower]")

from flexlora.deployment.flower import local_users
from flexlora.deployment.flower.local_users import GUARDED, OwnUserOnly

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
CLIENT, SERVER = ("127.0.0.1", 40001), ("127.0.0.1", 8000)
PATHS = ["/v1/control/start-run", "/v1/runtime/acquire-task", "/v1/fleet/push-object", "/docs", "/"]


class Transport:
    """Of a connection whose socket has the descriptor 0."""

    def get_extra_info(self, name):
        return SimpleNamespace(fileno=lambda: 0) if name == "socket" else None


class Asked:
    """A request to a guarded application, and what came of it."""

    def __init__(self, owner, path="/", open_to_nodes=False, body=(), headers=(), kind="http"):
        self.sent, self.passed, self.read = [], False, []
        body = list(body)

        async def app(scope, receive, send):
            self.passed = True
            while scope["type"] == "http" and body:
                self.read.append(await receive())
                if self.read[-1]["type"] == "http.disconnect":
                    return

        class Cycle:
            """Of uvicorn, whose request this is."""

            transport = Transport()

            async def receive(self):
                return {"type": "http.request", "body": body.pop(0), "more_body": bool(body)}

        async def send(event):
            self.sent.append(event)

        asked = []

        def find(peer, server, inode):
            asked.append((peer, server, inode))
            return owner

        scope = {"type": kind, "path": path, "client": CLIENT, "server": SERVER}
        scope["headers"] = list(headers)
        guard = OwnUserOnly(app, open_to_nodes, 100, find)
        asyncio.run(guard(scope, Cycle().receive, send))
        assert asked in ([], [(CLIENT, SERVER, os.fstat(0).st_ino)])

    @property
    def status(self):
        return self.sent[0]["status"] if self.sent else None


@pytest.mark.parametrize("path", [*PATHS, GUARDED])
@pytest.mark.parametrize("owner", [os.getuid() + 1, None, 65534])
def test_another_user_is_refused_whatever_is_asked(path, owner):
    asked = Asked(owner, path)
    assert asked.status == 403 and not asked.passed
    assert (b"connection", b"close") in asked.sent[0]["headers"]
    assert Asked(os.getuid(), path).passed or path == GUARDED


def test_without_keys_requests_of_nodes_pass_and_no_others():
    for path in PATHS:
        asked = Asked(65534, path, open_to_nodes=True)
        assert asked.passed is path.startswith("/v1/fleet/")
    for path in ("/v1/fleet", "/v1/fleet/../control/start-run", "//v1/fleet/x"):
        asked = Asked(65534, path, open_to_nodes=True)
        assert asked.passed is path.startswith("/v1/fleet/")


def test_it_says_that_it_is_there():
    assert Asked(os.getuid(), GUARDED).status == 200


def test_a_connection_whose_ends_are_unknown_is_refused():
    async def app(scope, receive, send):
        raise AssertionError("it passed")

    async def send(event):
        sent.append(event)

    guard = OwnUserOnly(app, False, 100, lambda *ends: os.getuid())
    receive = SimpleNamespace(transport=Transport())
    for missing in ("client", "server", "socket"):
        sent = []
        scope = {"type": "http", "path": "/", "headers": [], "client": CLIENT, "server": SERVER}
        bound = None if missing == "socket" else MethodType(lambda self: None, receive)
        asyncio.run(guard({**scope, missing: None}, bound, send))
        assert sent[0]["status"] == 403


def test_a_body_is_bounded_whether_its_length_is_said_or_not():
    length = [(b"content-length", b"101")]
    assert Asked(os.getuid(), "/v1/fleet/push-object", headers=length).status == 413
    assert Asked(os.getuid(), "/v1/runtime/push-object", headers=length).passed
    chunked = Asked(os.getuid(), "/v1/fleet/push-object", body=[b"x" * 60] * 50)
    assert [event["type"] for event in chunked.read] == ["http.request", "http.disconnect"]
    assert len(Asked(os.getuid(), "/v1/fleet/x", body=[b"x" * 50] * 2).read) == 2


@pytest.fixture
def connection():
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()) as client,
    ):
        served, _ = listener.accept()
        with served:
            yield client, served


@on_linux
def test_the_owner_of_a_connection_is_found(connection):
    client, served = connection
    assert local_users.can_tell()
    inode, other = (os.fstat(end.fileno()).st_ino for end in (served, client))
    assert local_users.owner(served.getpeername(), served.getsockname(), inode) == os.getuid()
    port = client.getsockname()[1]
    assert local_users.owner(("127.0.0.2", port), served.getsockname(), inode) is None
    assert local_users.owner(served.getpeername(), ("127.0.0.1", 1), inode) is None
    # As of a connection that took the place of another one.
    assert local_users.owner(served.getpeername(), served.getsockname(), other) is None


@on_linux
@pytest.mark.parametrize("how", ["closed", "waits", "reset"])
def test_a_connection_that_was_closed_belongs_to_nobody(connection, how):
    """Linux shows it as root's: who sends a request and leaves would be taken for root."""
    client, served = connection
    ends = served.getpeername(), served.getsockname(), os.fstat(served.fileno()).st_ino
    if how == "reset":
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    client.close()
    if how == "waits":
        served.close()
    assert local_users.owner(*ends) is None


LINES = """\
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:9C41 0100007F:1F40 01 00000000:00000000 00:00000000 00000000  1000        0 5 1 0
   1: 0100007F:9C42 0100007F:1F40 06 00000000:00000000 03:00000000 00000000     0        0 0 3 0
   2: 0100007F:1F40 0100007F:9C43 01 00000000:00000000 00:00000000 00000000     0        0 7 1 0
   3: 0100007F:1F40 0100007F:9C41 01 00000000:00000000 00:00000000 00000000     0        0 8 1 0
   4: 0100007F:1F40 0100007F:9C42 08 00000000:00000000 00:00000000 00000000     0        0 9 1 0
"""


@pytest.mark.skipif(sys.byteorder != "little", reason="the table has the machine's byte order")
def test_the_table_is_read_by_both_ends(tmp_path, monkeypatch):
    (tmp_path / "tcp").write_text(LINES)
    monkeypatch.setattr(local_users, "_TABLE", tmp_path / "tcp")
    asked = [(40001, 8), (40001, 9), (40002, 9), (40003, 7)]
    found = [local_users.owner(("127.0.0.1", port), SERVER, inode) for port, inode in asked]
    assert found == [1000, None, None, None]


def test_a_system_that_does_not_say_is_known(tmp_path, monkeypatch):
    assert local_users.unguarded(local_users.SERVER) == [] or not local_users.can_tell()
    monkeypatch.setattr(local_users, "_TABLE", tmp_path / "tcp")
    assert not local_users.can_tell()
    [sentence] = local_users.unguarded(local_users.SERVER)
    assert "other users of this machine can reach the SuperLink" in sentence


def test_uvicorn_has_the_socket_of_a_request():
    """In both of its implementations of HTTP."""
    import inspect

    from uvicorn.protocols.http import h11_impl, httptools_impl

    for module in (h11_impl, httptools_impl):
        assert "self.transport = transport" in inspect.getsource(module.RequestResponseCycle)
        assert "self.scope, self.receive, self.send" in inspect.getsource(module)
