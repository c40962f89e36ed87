import asyncio
import os
import sqlite3
import subprocess
import time
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="needs the extra 'flower'")

import httpx
from flwr.proto.fleet_pb2 import PullMessagesResponse
from flwr.proto.message_pb2 import PullObjectResponse
from flwr.supercore.inflatable import inflatable_utils

from flexlora.deployment.flower import pull_backoff
from flexlora.deployment.flower.gate import Gate
from flexlora.deployment.flower.gate_rules import RequestLimits
from flexlora.deployment.flower.long_poll import MOST_WAITING_BYTES, NOTHING_YET, LongPoll
from flexlora.deployment.flower.superlink import SuperLink
from flexlora.deployment.flower.supernode import supernode

MESSAGES, OBJECT = NOTHING_YET


def replied(status, content):
    return httpx.Response(status, content=content, headers={"content-length": str(len(content))})


def gate(answers, seconds=5.0):
    """A gate to a SuperLink that gives these answers, the last one for ever; what it was asked."""
    asked = []

    def answer(request):
        asked.append((request.url.path, request.content, dict(request.headers)))
        found = answers[min(len(asked), len(answers)) - 1]
        return found if isinstance(found, httpx.Response) else replied(200, found)

    client = httpx.AsyncClient(transport=httpx.MockTransport(answer))
    return Gate(
        "http://127.0.0.1:1",
        client,
        RequestLimits(),
        LongPoll(seconds, pause_seconds=0.01),
    ), asked


def post(app, path, content=b"node 7", headers=None):
    async def sent():
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://gate") as client:
            reply = await client.post(path.decode(), content=content, headers=headers)
        await app.client.aclose()
        return reply

    return asyncio.run(sent())


def test_what_flower_says_when_there_is_nothing_yet():
    assert PullMessagesResponse().SerializeToString() == NOTHING_YET[MESSAGES]
    known = PullObjectResponse(object_found=True, object_available=False)
    assert known.SerializeToString() == NOTHING_YET[OBJECT]
    assert PullObjectResponse().SerializeToString() != NOTHING_YET[OBJECT]


@pytest.mark.parametrize("path", [MESSAGES, OBJECT])
def test_a_node_hears_as_soon_as_there_is_something(path):
    app, asked = gate([NOTHING_YET[path], NOTHING_YET[path], b"something"])
    reply = post(app, path, headers={"flwr-signature": "s"})
    assert (reply.status_code, reply.content) == (200, b"something")
    assert [(where, body) for where, body, _ in asked] == [(path.decode(), b"node 7")] * 3
    assert {headers["flwr-signature"] for _, _, headers in asked} == {"s"}
    assert app.long_poll.count == 0


@pytest.mark.parametrize("path", [MESSAGES, OBJECT])
def test_a_question_is_not_held_for_ever(path):
    app, asked = gate([NOTHING_YET[path]], seconds=0.1)
    assert post(app, path).content == NOTHING_YET[path]
    assert 2 <= len(asked) <= 11


def test_a_gate_that_closes_holds_nothing():
    app, asked = gate([b""])
    app.long_poll.ending = lambda: True
    assert post(app, MESSAGES).content == b""
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("path", "found", "content"),
    [
        (b"/v1/fleet/confirm-message-received", replied(200, b""), b"x"),
        (MESSAGES, replied(401, b""), b"x"),
        (MESSAGES, replied(200, b""), b"x" * (MOST_WAITING_BYTES + 1)),
        (OBJECT, replied(200, b"\x08\x00"), b"x"),
        (OBJECT, replied(200, NOTHING_YET[OBJECT] + b"\x10\x01"), b"x"),
    ],
)
def test_all_other_answers_pass_at_once(path, found, content):
    app, asked = gate([found])
    reply = post(app, path, content)
    assert (reply.status_code, reply.content) == (found.status_code, found.content)
    assert [body for _, body, _ in asked] == [content]


def test_nothing_is_fetched_for_a_node_that_hung_up():
    app, asked = gate([b"", b"a message that would be lost"])
    events = [{"type": "http.request", "body": b"x"}, {"type": "http.disconnect"}]
    said = []

    async def receive():
        return events.pop(0)

    async def send(event):
        said.append(event)

    scope = {
        "type": "http",
        "method": "POST",
        "raw_path": MESSAGES,
        "query_string": b"",
        "headers": [(b"content-length", b"1")],
    }
    asyncio.run(app(scope, receive, send))
    assert len(asked) == 1
    assert said[0]["status"] == 400


def test_many_questions_share_what_the_superlink_is_asked():
    async def waited(count):
        poll = LongPoll(pause_seconds=0.01, count=count)
        started = time.monotonic()
        assert not await poll._has_left(asyncio.Event().wait)
        return time.monotonic() - started

    assert asyncio.run(waited(1)) < 0.2
    assert asyncio.run(waited(10)) >= 0.5


def test_flower_asks_sooner(monkeypatch):
    both = (inflatable_utils.pull_objects, inflatable_utils.pull_and_inflate_object_from_tree)
    for pull in both:
        assert pull.__kwdefaults__["initial_backoff"] == 1, "Flower has changed: is it needed?"
        monkeypatch.setattr(pull, "__kwdefaults__", pull.__kwdefaults__)
    pull_backoff.shorten_pull_backoff()
    tried = []

    def pull_one(id):
        tried.append(id)
        if len(tried) < 3:
            raise inflatable_utils.ObjectUnavailableError(id)
        return b"content"

    started = time.monotonic()
    assert inflatable_utils.pull_objects(["a"], pull_one) == {"a": b"content"}
    assert 0.2 < time.monotonic() - started < 0.9


def test_the_database_has_large_pages(tmp_path):
    SuperLink(tmp_path, 1, None)
    with sqlite3.connect(tmp_path / "state.db") as held:
        assert held.execute("PRAGMA page_size").fetchone() == (65536,)
        held.execute("CREATE TABLE kept (x)")
    held.close()
    SuperLink(tmp_path, 1, None)
    with sqlite3.connect(tmp_path / "state.db") as held:
        assert held.execute("SELECT name FROM sqlite_master").fetchall() == [("kept",)]
    held.close()


def test_a_node_starts_our_client_process(tmp_path):
    process = supernode("127.0.0.1:1", tmp_path, Path("/worker"), None, 2**20)
    first = Path(process.env["PATH"].split(os.pathsep)[0]) / "flwr-clientapp"
    (tmp_path / "flwr.py").write_text("raise SystemExit('not this one')")
    said = subprocess.check_output([first, "--help"], text=True, cwd=tmp_path, env=process.env)
    assert "--runtime-api-address" in said
