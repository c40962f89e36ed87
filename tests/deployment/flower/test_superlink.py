"""A real SuperLink behind the checks of this library."""

import contextlib
import os
import resource
import sqlite3
import sys
from http.client import HTTPConnection

import pytest

pytest.importorskip("flwr", reason="needs flexlora[flower]")

from flexlora.deployment.flower import local_users, superlink
from flexlora.deployment.flower.processes import free_port
from flexlora.deployment.flower.superlink import SuperLink
from flexlora.errors import ProtocolError

NOBODY = 65534


def asked(port: int, method: str, path: str, body: bytes = b"") -> int:
    """The status of a request."""
    connection = HTTPConnection("127.0.0.1", port, timeout=20)
    with contextlib.closing(connection):
        # A body that is too large is refused before it is sent to its end.
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            connection.request(method, path, body, {"content-type": "application/protobuf"})
            return connection.getresponse().status
        return 413


def as_nobody(request) -> int:
    """What a request returns to another user; a process of its own becomes that user."""
    child = os.fork()
    if child == 0:
        code = 1
        with contextlib.suppress(BaseException):
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            code = request() - 300  # an exit code is a byte
        os._exit(code)
    return 300 + os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.slow
@pytest.mark.skipif(
    sys.platform != "linux" or os.getuid() != 0, reason="becomes another user, as root can"
)
def test_no_other_user_of_the_machine_reaches_a_superlink(tmp_path):
    """With a run of its own it would have code run on every node."""
    link = SuperLink(tmp_path / "flower", free_port(), None)
    link.start()
    try:
        calls = [
            ("POST", "/v1/control/start-run"),
            ("POST", "/v1/control/list-nodes"),
            ("POST", "/v1/runtime/acquire-task"),
            ("POST", "/v1/runtime/push-object"),
            ("GET", "/health"),
            ("GET", "/openapi.json"),
            ("GET", local_users.GUARDED),
        ]
        for method, path in calls:
            assert asked(link.port, method, path) != 403, path
            assert as_nobody(lambda m=method, p=path: asked(link.port, m, p)) == 403, path
        assert link._registered() == set()  # Flower's own command, as this user
        # Of a node, which without keys may be another user's; its request is empty.
        node = as_nobody(lambda: asked(link.port, "POST", "/v1/fleet/pull-messages"))
        assert node == asked(link.port, "POST", "/v1/fleet/pull-messages") == 401
        assert asked(link.port, "POST", "/v1/fleet/push-object", bytes(6 * 2**20)) == 413
    finally:
        link.process.stop()


def test_a_superlink_without_the_check_is_not_served(tmp_path, monkeypatch):
    """As after a change of Flower's, by which its application is started otherwise."""
    monkeypatch.setattr(superlink, "_START_SECONDS", 3.0)
    link = SuperLink(tmp_path / "flower", free_port(), None)
    link.process.arguments = [sys.executable, "-m", "http.server", str(link.port)]
    with pytest.raises(ProtocolError, match="did not start"):
        link.start()
    assert link.process.ended is not None


def test_a_database_gives_back_the_room_of_what_was_deleted(tmp_path):
    link = SuperLink(tmp_path / "flower", 1, None)
    file = link.home / "state.db"
    with contextlib.closing(sqlite3.connect(file)) as database:
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("CREATE TABLE objects (content BLOB)")
        for _ in range(4):
            database.execute("INSERT INTO objects VALUES (?)", (bytes(5 * 2**20),))
        database.commit()
        database.execute("DELETE FROM objects")
        database.commit()
    assert file.stat().st_size > 20 * 2**20
    link._shrink_database()
    assert file.stat().st_size < 2**20


@contextlib.contextmanager
def largest_file(size: int):
    """No file of this process grows beyond this size, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_database_that_cannot_be_made_is_a_sentence_and_is_not_left_behind(tmp_path):
    home = tmp_path / "flower"
    link = SuperLink(home, 1, None)
    (home / "state.db").unlink()
    with (
        largest_file(2**13),
        pytest.raises(ProtocolError, match=r"state\.db cannot be used: the di"),
    ):
        link._make_database()
    assert not (home / "state.db").exists()
    (home / "state.db").mkdir()
    with pytest.raises(ProtocolError, match=r"it cannot be opened; change the permissions of its"):
        link._shrink_database()


def test_a_database_that_another_program_has_locked_or_that_is_damaged_is_a_sentence(
    tmp_path, monkeypatch
):
    link = SuperLink(tmp_path / "flower", 1, None)
    file, connect = link.home / "state.db", sqlite3.connect
    monkeypatch.setattr(superlink.sqlite3, "connect", lambda path: connect(path, timeout=0))
    with contextlib.closing(connect(file)) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(ProtocolError, match="another program uses it; end that program"):
            link._shrink_database()
    good = file.read_bytes()
    for damage in (b"x" * len(good), good[:100] + b"\xff" * (len(good) - 100)):
        file.write_bytes(damage)
        with pytest.raises(ProtocolError, match="it is damaged; restore it from a copy"):
            link._shrink_database()
    file.write_bytes(good)
    link._shrink_database()


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (sqlite3.SQLITE_FULL, "the disk is full; free some space"),
        (sqlite3.SQLITE_READONLY_DIRECTORY, "it may not be written; change its permissions"),
        (sqlite3.SQLITE_IOERR_WRITE, "the disk refused to read or write it; free some space"),
        (sqlite3.SQLITE_NOLFS, "SQLite says disk"),
        (None, "SQLite says disk"),
    ],
)
def test_what_sqlite_says_is_a_sentence(tmp_path, monkeypatch, code, words):
    link = SuperLink(tmp_path / "flower", 1, None)

    def refusing(path):
        error = sqlite3.OperationalError("disk")
        if code is not None:
            error.sqlite_errorcode = code
        raise error

    monkeypatch.setattr(superlink.sqlite3, "connect", refusing)
    with pytest.raises(ProtocolError, match=words):
        link._shrink_database()


def test_a_command_of_flowers_that_hangs_is_a_sentence(tmp_path, monkeypatch):
    hangs = tmp_path / "flwr"
    hangs.write_text("#!/bin/sh\nexec sleep 20\n")
    hangs.chmod(0o755)
    link = SuperLink(tmp_path / "flower", 1, None)
    monkeypatch.setattr(superlink, "_START_SECONDS", 0.1)
    monkeypatch.setattr(superlink, "program", lambda name: str(hangs))
    with pytest.raises(ProtocolError, match="did not answer `flwr ls run` within 0 s"):
        link.status("5")
