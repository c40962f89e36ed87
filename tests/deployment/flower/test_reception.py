"""The gate's own answer: whether a key is registered; and notes on keys that nobody knows."""

import asyncio
import json
from datetime import UTC, datetime, timedelta

import pytest

pytest.importorskip("flwr", reason="needs flexlora[flower]")

from flexlora import __version__
from flexlora.deployment.flower import gate, reception
from flexlora.deployment.flower.reception import Reception
from flexlora.deployment.flower.signatures import RegisteredKeys
from flexlora.deployment.greeting import HELLO, KEY_HEADER, NAME_HEADER
from flexlora.deployment.server import run_files
from flexlora.deployment.server.run_files import ARRIVALS, DELIVERED, NODES, NUMBERS

KEY = "SHA256:" + "a" * 43
OTHER = "SHA256:" + "b" * 43


def scope(key: str = KEY, name: str = "ash", path: str = HELLO, **changes) -> dict:
    headers = [(KEY_HEADER.encode(), key.encode()), (NAME_HEADER.encode(), name.encode())]
    plain = {"type": "http", "method": "GET", "raw_path": path.encode(), "query_string": b""}
    return {**plain, "headers": headers, "client": ("10.0.0.7", 4711), **changes}


def answered(app, request: dict) -> tuple[int, dict]:
    """The status and the content that an ASGI application answers."""
    sent = []

    async def send(message):
        sent.append(message)

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    asyncio.run(app(request, receive, send))
    body = b"".join(message.get("body", b"") for message in sent[1:])
    return sent[0]["status"], json.loads(body)


@pytest.fixture
def front(tmp_path):
    """A gate that knows the run in the folder, before a SuperLink that is not there."""
    return gate.app("http://127.0.0.1:9", None, run=tmp_path)


def test_the_gate_says_what_it_knows_of_a_key(front, tmp_path):
    assert answered(front, scope())[1]["key"] == "unknown"
    run_files.write_numbers(tmp_path, NUMBERS, {KEY: 7, OTHER: 8})
    run_files.write_numbers(tmp_path, NODES, {"ash": 7})
    status, facts = answered(front, scope())
    time = datetime.fromisoformat(facts.pop("time"))
    assert (status, facts) == (
        200,
        {"version": __version__, "key": "registered", "finished": False},
    )
    assert abs(datetime.now(UTC) - time) < timedelta(minutes=1)
    assert answered(front, scope(OTHER))[1]["key"] == "revoked"
    (tmp_path / DELIVERED).write_text("{}")
    assert answered(front, scope())[1]["finished"] is True


@pytest.mark.parametrize(
    "request_",
    [
        scope(path=HELLO + "/"),
        scope(path="/v1/flexlora/HELLO"),
        scope(query_string=b"a=b"),
        scope(method="POST"),
    ],
)
def test_anything_else_is_refused_as_before(front, request_):
    assert answered(front, request_)[0] in (403, 405)


def test_a_gate_of_no_run_answers_no_hello():
    assert answered(gate.app("http://127.0.0.1:9", None), scope())[0] == 403


def notes(folder) -> list[str]:
    file = folder / ARRIVALS
    return file.read_text().splitlines() if file.exists() else []


def test_an_unknown_key_is_noted_with_address_name_and_remedy_once(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(reception.time, "monotonic", lambda: now[0])
    desk = Reception(tmp_path, RegisteredKeys(tmp_path))
    send = scope("SHA256:" + "c" * 43)

    def knocks(request):
        async def sent(message):
            pass

        asyncio.run(desk.answer(request, sent))

    for _ in range(3):
        knocks(send)
    (line,) = notes(tmp_path)
    assert line.startswith(
        "a client at 10.0.0.7 that calls itself ash has an unknown key, SHA256:c"
    )
    assert line.endswith("to admit it: flexlora keys DIR --add NAME.pub")
    knocks(scope("SHA256:" + "d" * 43))  # at most one in five seconds
    assert len(notes(tmp_path)) == 1
    now[0] += 6
    knocks(scope("SHA256:" + "d" * 43, name="\x1b[2J"))
    assert len(notes(tmp_path)) == 2 and "\x1b" not in notes(tmp_path)[1]
    assert "calls itself" not in notes(tmp_path)[1]
    now[0] += 601
    knocks(send)
    assert len(notes(tmp_path)) == 3


@pytest.mark.parametrize("key", ["", "SHA256:short", "SHA256:" + "e" * 44, "\x1b[2J"])
def test_what_is_no_fingerprint_is_not_noted(front, tmp_path, key):
    assert answered(front, scope(key))[1]["key"] == "unknown"
    assert notes(tmp_path) == []


def test_strangers_do_not_fill_the_console(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(reception.time, "monotonic", lambda: now[0])
    desk = Reception(tmp_path, RegisteredKeys(tmp_path))

    async def sent(message):
        pass

    for number in range(600):  # one a second, each with a key of its own
        now[0] += 1
        address = (f"10.0.{number % 9}.7", 4711)
        asyncio.run(desk.answer(scope(f"SHA256:{number:043d}", client=address), sent))
    assert len(notes(tmp_path)) == 12
    now[0] += 600
    for number in range(600, 700):
        now[0] += 1
        asyncio.run(desk.answer(scope(f"SHA256:{number:043d}"), sent))
    assert len(notes(tmp_path)) == 15  # three of one address
