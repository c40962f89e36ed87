"""Requests over a private socket: who may ask, what is too long, and who goes away."""

import gc
import json
import os
import shutil
import socket
import stat
import struct
import tempfile
import threading
from pathlib import Path

import pytest

from flexlora.deployment.node import worker_socket
from flexlora.deployment.node.worker_socket import LONGEST_HEADER_BYTES, Worker


@pytest.fixture
def folder():
    # A test's own folder is too deep for a socket.
    path = Path(tempfile.mkdtemp(prefix="flexlora-"))
    yield path
    shutil.rmtree(path)


def echo(header, payload):
    return {"heard": dict(header)}, payload[::-1]


@pytest.fixture
def serving(folder):
    """Starts workers with an answer; where they listen."""
    started = []

    def start(answer=echo) -> Path:
        path = folder / f"{len(started)}.sock"
        made = Worker(path, answer)
        thread = threading.Thread(target=made.serve, daemon=True)
        thread.start()
        started.append((made, thread))
        return path

    yield start
    for made, thread in started:
        made.close()
        thread.join(5)
        assert not thread.is_alive()


def sent(path: Path, data: bytes) -> bytes:
    """What comes back on these very bytes, until the worker closes."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asker:
        asker.settimeout(5)
        asker.connect(str(path))
        try:
            asker.sendall(data)
            asker.shutdown(socket.SHUT_WR)
            return b"".join(iter(lambda: asker.recv(2**16), b""))
        except (BrokenPipeError, ConnectionResetError):
            return b""  # it closed before it had read all


def request(header: bytes, payload: bytes = b"") -> bytes:
    return struct.pack("<QQ", len(header), len(payload)) + header + payload


def test_requests_are_answered_one_after_the_other(serving):
    path = serving()
    for number in range(5):
        payload = bytes(range(7)) * (number + 1)
        said, data = worker_socket.request(path, {"number": number}, payload)
        assert said == {"heard": {"number": number}} and data == payload[::-1]


@pytest.mark.parametrize("size", [0, 1, 3 * 2**20 + 5])
def test_payloads_of_any_size_come_back_whole(serving, size):
    payload = os.urandom(size)
    assert worker_socket.request(serving(), {}, payload)[1] == payload[::-1]


def test_askers_at_the_same_time_get_their_own_answers(serving):
    path, got = serving(), {}

    def one(number):
        got[number] = worker_socket.request(path, {"number": number}, bytes([number]) * 1000)

    threads = [threading.Thread(target=one, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert {n: a[0]["heard"]["number"] for n, a in got.items()} == {n: n for n in range(8)}
    assert all(data == bytes([n]) * 1000 for n, (_, data) in got.items())


def test_the_socket_is_its_owners_alone(serving):
    assert stat.S_IMODE(serving().stat().st_mode) == 0o600


@pytest.mark.parametrize("mode", [0o710, 0o701, 0o755, 0o777])
def test_a_folder_open_to_others_is_refused(folder, mode):
    open_ = folder / "open"
    open_.mkdir()
    open_.chmod(mode)
    with pytest.raises(ValueError, match=r"is open to other users; run: chmod 700"):
        Worker(open_ / "s", echo)
    assert not list(open_.iterdir())


def test_a_path_too_long_for_a_socket_is_refused(folder):
    path = folder / ("s" * 101)
    with pytest.raises(ValueError, match=rf"has {len(str(path))} bytes.*shorter path"):
        Worker(path, echo)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_path_too_long_in_bytes_is_refused(folder):
    try:
        Worker(folder / ("ü" * 60), echo)
    except (ValueError, OSError) as error:
        said = str(error)
    gc.collect()  # the socket, which is left open
    assert "shorter path" in said


def test_what_an_earlier_worker_left_behind_is_replaced(folder, serving):
    (folder / "0.sock").write_text("left behind")
    assert worker_socket.request(serving(), {}, b"ab")[1] == b"ba"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x01",
        request(b"{}")[:15],
        request(b"{}")[:17],  # the header is cut off
        request(b"{}", b"abc")[:-1],  # the payload is
        struct.pack("<QQ", LONGEST_HEADER_BYTES + 1, 0) + b"{",
        struct.pack("<QQ", 2**63, 2**63),
        request(b"no JSON"),
        request(b"[1, 2]"),
        request(b"\xff\xfe"),
    ],
)
def test_a_request_that_is_none_is_dropped_and_the_next_is_answered(serving, data):
    asked = []

    def answer(header, payload):
        asked.append(header)
        return {}, payload

    path = serving(answer)
    assert sent(path, data) == b""
    assert asked == []
    assert worker_socket.request(path, {"kind": "turn"}, b"x") == ({}, b"x")


def test_a_header_as_long_as_may_be_is_answered(serving):
    header = json.dumps({"a": ""}).encode()
    header = header[:-2] + b"b" * (LONGEST_HEADER_BYTES - 100) + header[-2:]
    assert sent(serving(lambda said, _: ({"long": len(said["a"])}, b"")), request(header))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_payload_too_large_for_memory_does_not_end_the_worker(folder):
    made = Worker(folder / "s", echo)
    thread = threading.Thread(target=made.serve, daemon=True)
    thread.start()
    try:
        # More than any machine has: as a download on a machine that is too small for it.
        sent(folder / "s", struct.pack("<QQ", 2, 2**62) + b"{}")
        thread.join(1)
        assert thread.is_alive()
    finally:
        made.close()


def test_an_asker_that_goes_away_loses_its_answer_alone(serving):
    begun, go_on = threading.Event(), threading.Event()
    answered = []

    def slow(header, payload):
        begun.set()
        go_on.wait(10)
        answered.append(header["number"])
        return {"number": header["number"]}, b"x" * 2**22

    path = serving(slow)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asker:
        asker.connect(str(path))
        asker.sendall(request(b'{"number": 1}'))
        assert begun.wait(10)
    go_on.set()
    assert worker_socket.request(path, {"number": 2}, b"")[0] == {"number": 2}
    assert answered == [1, 2]


def test_an_asker_that_falls_silent_does_not_keep_the_others_waiting(serving, monkeypatch):
    monkeypatch.setattr(worker_socket, "_SILENT_SECONDS", 0.1)
    path = serving()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asker:
        asker.connect(str(path))
        asker.sendall(request(b"{}", b"abc")[:-1])
        assert worker_socket.request(path, {}, b"ab")[1] == b"ba"


def test_an_answer_too_long_is_an_error_of_the_asker(serving):
    path = serving(lambda said, _: ({"error": "x" * (LONGEST_HEADER_BYTES + 1)}, b""))
    with pytest.raises(ValueError, match="the limit is"):
        worker_socket.request(path, {}, b"")


def test_asking_nobody_says_what_to_look_at(folder):
    with pytest.raises(
        ValueError, match=r"`flexlora join` has ended on this client's machine .*start it again"
    ):
        worker_socket.request(folder / "nobody", {}, b"")


def test_a_worker_that_goes_away_is_an_error_of_the_asker(serving):
    def broken(header, payload):
        raise OSError("the disk is gone")

    with pytest.raises(ValueError, match="has ended on this client"):
        worker_socket.request(serving(broken), {}, b"")


def test_closing_takes_the_socket_away(folder):
    made = Worker(folder / "s", echo)
    thread = threading.Thread(target=made.serve)
    thread.start()
    made.close()
    thread.join(5)
    assert not thread.is_alive() and not (folder / "s").exists()
