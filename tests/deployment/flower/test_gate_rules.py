"""The gate's rules by themselves, without a gate: what passes, and what else is answered how."""

import asyncio
import json

import pytest

pytest.importorskip("httpx", reason="needs the extra 'flower'")

import httpx

from flexlora.deployment.flower import gate_rules
from flexlora.deployment.flower.gate_rules import Refused, RequestLimits

LIMITS = RequestLimits(object_bytes=41, message_bytes=23, other_bytes=11)
PATH = b"/v1/fleet/get-run"
LENGTH = (b"content-length", b"7")
CHUNKED = (b"transfer-encoding", b"chunked")


def request(path=PATH, headers=(LENGTH,), method="POST", query=b"", **more):
    scope = {"raw_path": path, "method": method, "query_string": query, "headers": [*headers]}
    return {**scope, "root_path": "", **more}


def status(scope):
    with pytest.raises(Refused) as caught:
        gate_rules.body_length(scope, LIMITS)
    assert caught.value.reason.endswith(".")
    return caught.value.status


@pytest.mark.parametrize("call", gate_rules.CALLS)
def test_a_call_passes_with_the_length_of_its_body(call):
    assert gate_rules.body_length(request(f"/v1/fleet/{call}".encode()), LIMITS) == 7


@pytest.mark.parametrize(
    ("scope", "code"),
    [
        (request(b"/v1/fleet/register-node"), 412),
        (request(b"/v1/fleet/unregister-node"), 412),
        (request(b"/v1/fleet/get-runs"), 403),
        (request(query=b"a"), 403),
        (request(root_path="/a"), 403),
        ({key: value for key, value in request().items() if key != "raw_path"}, 403),
        (request(method="GET"), 405),
        (request(method="post"), 405),
        (request(headers=[LENGTH, *[(b"a", b"b")] * 64]), 431),
        (request(headers=[CHUNKED]), 411),
        (request(headers=[]), 400),
        (request(headers=[LENGTH, LENGTH]), 400),
        (request(headers=[LENGTH, CHUNKED]), 400),
        *((request(headers=[(b"content-length", text)]), 400) for text in (b"", b"-7", b"+7")),
        *((request(headers=[(b"content-length", text)]), 400) for text in (b"7 ", b"7,7", b"0x7")),
        (request(headers=[(b"content-length", b"0" * 19 + b"7")]), 400),
        (request(headers=[(b"content-length", b"12")]), 413),
    ],
)
def test_everything_else_is_refused_with_its_status(scope, code):
    assert status(scope) == code


def test_the_most_of_everything_passes():
    assert gate_rules.body_length(request(headers=[LENGTH, *[(b"a", b"b")] * 63]), LIMITS) == 7
    assert gate_rules.body_length(request(headers=[(b"content-length", b"0" * 18 + b"7")]), LIMITS)
    no_root_path = {key: value for key, value in request().items() if key != "root_path"}
    assert gate_rules.body_length(no_root_path, LIMITS) == 7


@pytest.mark.parametrize(
    ("call", "most"), [("push-object", 41), ("push-messages", 23), ("get-fab", 11)]
)
def test_the_largest_body_depends_on_the_call(call, most):
    path = f"/v1/fleet/{call}".encode()
    for length, passes in ((most, True), (most + 1, False)):
        scope = request(path, [(b"content-length", b"%d" % length)])
        if passes:
            assert gate_rules.body_length(scope, LIMITS) == length
        else:
            assert status(scope) == 413


def test_the_limits_are_those_that_are_documented():
    limits = RequestLimits()
    assert (limits.object_bytes, limits.message_bytes) == (5_242_880 + 65_536, 262_144)
    assert (limits.other_bytes, limits.window_bytes) == (16_384, 65_536)


def test_headers_that_the_superlink_sees():
    sent = [
        *[(b"content-type", b"a"), (b"accept", b"b"), (b"flwr-x", b"c"), (b"cookie", b"d")],
        *[(b"x-forwarded-for", b"9.9.9.9"), (b"host", b"e"), (b"flwr-y", b"f")],
        *[(b"accept", b"g"), (b"connection", b"close, Flwr-Y ,x")],
    ]
    passed = [(b"content-type", b"a"), (b"accept", b"b"), (b"flwr-x", b"c"), (b"accept", b"g")]
    with_address = gate_rules.forwarded_headers({"headers": sent, "client": ("1.2.3.4", 5)})
    assert with_address == [*passed, (b"x-forwarded-for", b"1.2.3.4")]
    assert gate_rules.forwarded_headers({"headers": sent}) == passed


def test_headers_that_the_node_sees():
    sent = [(b"Content-Type", b"a"), (b"DATE", b"b"), (b"Server", b"c"), (b"Upgrade", b"d")]
    sent += [(b"Connection", b"X-One, x-two"), (b"X-One", b"e"), (b"x-TWO", b"f"), (b"X-3", b"g")]
    assert gate_rules.returned_headers(sent) == [(b"content-type", b"a"), (b"x-3", b"g")]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (httpx.PoolTimeout(""), 503),
        (httpx.ReadTimeout(""), 504),
        (TimeoutError(), 504),
        (httpx.ConnectError(""), 502),
    ],
)
def test_a_failure_on_the_way_has_a_status(error, code):
    assert gate_rules.refusal(error).status == code


def test_a_refusal_stays_and_a_bug_is_none():
    refused = Refused(413, "Too much.")
    assert gate_rules.refusal(refused) is refused
    with pytest.raises(KeyError):
        gate_rules.refusal(KeyError("bug"))


@pytest.mark.parametrize(
    ("code", "more"), [(405, {b"allow": b"POST"}), (503, {b"retry-after": b"1"}), (403, {})]
)
def test_a_refusal_is_flowers_error_and_the_end_of_the_connection(code, more):
    sent = []

    async def send(message):
        sent.append(message)

    asyncio.run(gate_rules.send_refusal(Refused(code, "Née."), send))
    start, body = sent
    assert json.loads(body["body"]) == {"code": code, "detail": "Née."}
    assert (start["type"], start["status"]) == ("http.response.start", code)
    length = b"%d" % len(body["body"])
    fixed = {b"content-type": b"application/json", b"content-length": length}
    assert dict(start["headers"]) == {**fixed, b"connection": b"close", **more}
    assert len(start["headers"]) == 3 + len(more)
