import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="needs the extra 'flower'")

import httpx
from hypothesis import given
from hypothesis import strategies as st

from flexlora.deployment.certificates import make_server
from flexlora.deployment.flower import gate, gate_rules
from flexlora.deployment.flower.gate_rules import RequestLimits
from flexlora.deployment.keys import make_node
from support.gate import SuperLink, awaited, connect, gate_process, say, split, standing_in

NGINX_CONF = Path(__file__).parents[3] / "deploy" / "nginx.conf"
PULL, PUSH = "/v1/fleet/pull-messages", "/v1/fleet/push-object"
PROTOBUF = {"content-type": "application/x-protobuf"}
CLOSED = [
    "/",
    "/health",
    "/docs",
    "/openapi.json",
    "*",
    "/v1/control/start-run",
    "/v1/control/register-node",
    "/v1/control/list-runs",
    "/v1/runtime/acquire-task",
    "/v1/runtime/responses",
    "/v1/fleet",
    "/v1/fleet/",
    "/v1/fleet/register-node",
    "/v1/fleet/unregister-node",
    "/v1/fleet/pull-messages/",
    "/v1/fleet/pull-messages?x=1",
    "/v1/fleet/pull-messages#x",
    "/v1/fleet/pull-messages;x",
    "/v1/fleet/pull-messages%00",
    "/v1/fleet/pull-message%73",
    "/v1/fleet/Pull-Messages",
    "/V1/FLEET/pull-messages",
    "/V1/CONTROL/start-run",
    "/v1/%66leet/pull-messages",
    "/v1//fleet/pull-messages",
    "//v1/fleet/pull-messages",
    "/./v1/fleet/pull-messages",
    "/v1/control/../fleet/pull-messages",
    "/v1/fleet/../control/start-run",
    "/v1/fleet/%2e%2e/control/start-run",
    "/v1/fleet/%2E%2E%2Fcontrol%2Fstart-run",
    "/v1/fleet/..%2fcontrol/start-run",
    "/v1/fleet/..;/control/start-run",
    "/v1/fleet/..\\control\\start-run",
    "/v1/fleet/pull-messages/../../control/start-run",
    "/v1/fleet/%252e%252e/control/start-run",
    "/v1/%63ontrol/start-run",
    "http://localhost/v1/control/start-run",
    "HTTP://LOCALHOST/v1/control/start-run",
    "http://localhost/v1/fleet/../control/start-run",
    "http://169.254.169.254/latest/meta-data",
    "https://example.org/v1/control/start-run",
]


@contextlib.contextmanager
def nginx_process(folder, keys, link):
    if shutil.which("nginx") is None:
        pytest.skip("nginx is not installed")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    site = NGINX_CONF.read_text()
    for old, new in {
        "listen 8443 ssl;": f"listen 127.0.0.1:{port} ssl;",
        "127.0.0.1:8000": f"127.0.0.1:{link.port}",
        "/etc/flexlora/": f"{keys.key.parent}/",
    }.items():
        assert old in site
        site = site.replace(old, new)
    (folder / "site.conf").write_text(site)
    spools = "".join(
        f"{kind}_temp_path {folder}/{kind};"
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    # Run as root, the workers would be somebody else, who cannot read a test's folder.
    (folder / "nginx.conf").write_text(
        f"{'user root;' if os.getuid() == 0 else ''} daemon off; pid {folder}/pid;\n"
        f"events {{}}\nhttp {{ access_log off; {spools} include {folder}/site.conf; }}\n"
    )
    process = subprocess.Popen(
        ["nginx", "-p", str(folder), "-e", f"{folder}/error.log", "-c", f"{folder}/nginx.conf"]
    )
    try:
        awaited(folder / "pid", process)
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(15)


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    return make_server(tmp_path_factory.mktemp("keys") / "server", [])


@pytest.fixture(scope="module")
def link(keys):
    with standing_in(keys) as link:
        yield link


@pytest.fixture(scope="module", params=["gate", "nginx"])
def door(request, tmp_path_factory, keys, link):
    """The address of a gate with TLS on both sides, ours or nginx with deploy/nginx.conf."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "nginx":
        with nginx_process(folder, keys, link) as address:
            yield address
    else:
        files = ("--ca", keys.ca, "--cert", keys.certificate, "--key", keys.key)
        # Were the environment's proxy used, nothing would arrive.
        proxies = {"HTTPS_PROXY": "http://127.0.0.1:9", "ALL_PROXY": "http://127.0.0.1:9"}
        with gate_process(folder, "--upstream", link.url, *files, **proxies) as address:
            yield address


@pytest.fixture(autouse=True)
def fresh(link):
    link.seen.clear()
    link.arriving.clear()
    link.answer = None


def ask(door, keys, method, target, body=b"x", headers=PROTOBUF):
    """Send the target as it is, without the tidying of an HTTP client."""
    with connect(door, keys) as link:
        link._validate_path = lambda _: None
        link.request(method, target, body=body, headers=headers)
        reply = link.getresponse()
        return reply.status, reply.read(), {k.lower(): v for k, v in reply.getheaders()}


def raw(*headers, target=PULL, body=b""):
    lines = [f"POST {target} HTTP/1.1", "Host: localhost", "Connection: close", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


def test_the_calls_are_those_of_flowers_nodes():
    from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES

    theirs = {path for _, path in PROTOBUF_REQUEST_TYPES if path.startswith("/v1/fleet/")}
    ours = {f"/v1/fleet/{call}" for call in gate_rules.CALLS}
    assert theirs - ours == {"/v1/fleet/register-node", "/v1/fleet/unregister-node"}
    assert ours < theirs
    assert {method for method, path in PROTOBUF_REQUEST_TYPES if path in ours} == {"POST"}


@pytest.mark.parametrize("call", gate_rules.CALLS)
def test_what_a_node_needs_passes(door, keys, link, call):
    body = bytes(range(256)) * 9
    status, answer, headers = ask(door, keys, "POST", f"/v1/fleet/{call}", body)
    assert (status, answer) == (200, body)
    assert headers["content-type"] == "application/x-protobuf"
    [(method, path, _, arrived)] = link.seen
    assert (method, path, arrived) == ("POST", f"/v1/fleet/{call}", body)


@pytest.mark.parametrize("target", CLOSED)
def test_everything_else_is_closed(door, keys, link, target):
    heard = say(door, keys, raw("Content-Length: 1", target=target, body=b"x"))
    assert not link.seen
    # Both parsers may find a target malformed before the rule is asked.
    assert heard.split(b" ")[1] in (b"403", b"400", b"404", b"405", b"412")


def test_every_other_path_of_the_superlink_is_forbidden(door, keys, link):
    from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES
    from flwr.superlink.main import create_app

    paths = {path for _, path in PROTOBUF_REQUEST_TYPES}
    paths |= set(create_app().openapi()["paths"])
    paths = {path for path in paths if not path.startswith("/v1/fleet/")}
    assert len(paths) > 60
    for path in sorted(paths):
        status, body, _ = ask(door, keys, "POST", path)
        assert (status, body.count(b"\n")) == (403, 1), path
        reason = json.loads(body)["detail"]
        assert reason == "The gate forwards only the requests of a registered Flower node."
    assert not link.seen


@pytest.mark.parametrize("call", ["register-node", "unregister-node"])
def test_a_node_does_not_register_itself(door, keys, link, call):
    status, body, _ = ask(door, keys, "POST", f"/v1/fleet/{call}")
    assert (status, json.loads(body)["code"]) == (412, 412)
    assert "send a public key" in json.loads(body)["detail"]
    assert not link.seen


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"])
def test_other_methods_are_closed(door, keys, link, method):
    status, _, _ = ask(door, keys, method, PULL)
    assert status in (403, 405)
    assert not link.seen


def test_no_tunnel(door, keys, link):
    connect = b"CONNECT 127.0.0.1:22 HTTP/1.1\r\nHost: 127.0.0.1:22\r\nConnection: close\r\n\r\n"
    assert say(door, keys, connect).split(b" ")[1] in (b"400", b"403", b"405")
    upgrade = "GET /v1/fleet/pull-messages HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, close\r\n"
    upgrade += "Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: eA==\r\n\r\n"
    assert say(door, keys, upgrade.encode()).split(b" ")[1] in (b"403", b"405")
    assert not link.seen


@given(
    st.one_of(
        st.binary(max_size=40),
        st.sampled_from(sorted(gate_rules.ALLOWED_PATHS)).flatmap(
            lambda path: st.integers(0, len(path) - 1).flatmap(
                lambda at: st.binary(min_size=1, max_size=3).map(
                    lambda new: path[:at] + new + path[at + 1 :]
                )
            )
        ),
    ).filter(lambda path: path not in gate_rules.ALLOWED_PATHS)
)
def test_no_other_bytes_pass(path):
    scope = {"type": "http", "method": "POST", "raw_path": path, "query_string": b""}
    with pytest.raises(gate_rules.Refused) as refused:
        gate_rules.body_length({**scope, "headers": [(b"content-length", b"0")]}, RequestLimits())
    # A node that would register itself is refused in words that it understands.
    assert refused.value.status in (403, 412)


def test_the_two_rules_are_the_same():
    listed = re.findall(r'"~\^POST /v1/fleet/(\S+)\\z" +1;', NGINX_CONF.read_text())
    assert tuple(listed) == gate_rules.CALLS


def test_headers_that_matter_pass_and_no_others(door, keys, link):
    sent = {
        **PROTOBUF,
        "flwr-public-key": "k",
        "flwr-timestamp": "2026-01-01T00:00:00+00:00",
        "flwr-signature": "s",
        "accept": "application/x-protobuf",
        "Cookie": "a=b",
        "Authorization": "Bearer x",
        "X-Forwarded-For": "1.2.3.4",
        "X-Forwarded-Proto": "http",
        "Forwarded": "for=1.2.3.4",
        "Connection": "keep-alive, X-Mine",
        "Keep-Alive": "timeout=5",
        "TE": "trailers",
        "Proxy-Authorization": "Basic x",
    }
    status, _, _ = ask(door, keys, "POST", PULL, headers=sent)
    assert status == 200
    [(_, _, pairs, _)] = link.seen
    arrived = {name.lower(): value for name, value in pairs}
    for name in ("flwr-public-key", "flwr-timestamp", "flwr-signature", "content-type", "accept"):
        assert arrived[name] == sent[name]
    assert arrived["x-forwarded-for"] == "127.0.0.1"
    hidden = {"cookie", "authorization", "x-forwarded-proto", "forwarded", "te"}
    assert not hidden & set(arrived)
    assert "X-Mine" not in arrived.get("connection", "")


def test_the_superlinks_hop_by_hop_headers_stay_behind(door, keys, link):
    def answer(handler):
        handler.send_response(412)
        for name, value in {
            "content-type": "application/json",
            "flwr-version-incompatibility-message": "old",
            "connection": "close",
            "keep-alive": "timeout=5",
            "proxy-authenticate": "Basic",
            "content-length": "2",
        }.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(b"{}")

    link.answer = answer
    status, body, headers = ask(door, keys, "POST", PULL)
    assert (status, body) == (412, b"{}")
    assert headers["flwr-version-incompatibility-message"] == "old"
    assert "keep-alive" not in headers
    assert "python" not in headers.get("server", "").lower()


def test_a_body_is_bounded(keys, link, tmp_path):
    limits = RequestLimits(object_bytes=3000, message_bytes=2000, other_bytes=1000)
    app = gate.app(link.url, keys.ca, limits)
    calls = {"push-object": 3000, "push-messages": 2000, "pull-messages": 1000, "get-fab": 1000}

    async def sent():
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://gate") as client:
            for call, most in calls.items():
                within = await client.post(f"/v1/fleet/{call}", content=b"x" * most)
                over = await client.post(f"/v1/fleet/{call}", content=b"x" * (most + 1))
                yield most, within, over
        await app.client.aclose()

    async def all_of_them():
        return [each async for each in sent()]

    for most, within, over in asyncio.run(all_of_them()):
        assert (within.status_code, over.status_code) == (200, 413)
        assert over.json() == {"code": 413, "detail": f"The body has more than {most} bytes."}
        assert over.headers["connection"] == "close"
    assert [len(body) for *_, body in link.seen] == list(calls.values())


def test_the_limits_fit_flower():
    """The largest bodies of Flower's nodes: an object, and the list of a message's objects."""
    from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE
    from flwr.proto.fleet_pb2 import PushMessagesRequest
    from flwr.proto.message_pb2 import Message, ObjectTree, PushObjectRequest
    from flwr.proto.node_pb2 import Node

    limits, node, id = RequestLimits(), Node(node_id=2**63 + 7), "f" * 64
    chunk = b"x" * (FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE + 1000)  # with the object's own header
    pushed = PushObjectRequest(
        node=node, run_id=2**63, object_id=id, object_content=chunk, session_id=id
    )
    assert pushed.ByteSize() < limits.body_bytes(b"/v1/fleet/push-object")
    # 10 GiB in one message.
    leaves = [ObjectTree(object_id=id)] * (10 * 2**30 // FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE)
    tree = ObjectTree(object_id=id, children=leaves)
    message = PushMessagesRequest(node=node, messages_list=[Message()], message_object_trees=[tree])
    assert message.ByteSize() < limits.body_bytes(b"/v1/fleet/push-messages")


def test_bodies_of_ambiguous_length_are_refused(door, keys, link):
    both = raw("Content-Length: 1", "Transfer-Encoding: chunked", body=b"0\r\n\r\n")
    two = raw("Content-Length: 1", "Content-Length: 2", body=b"xx")
    odd = raw("Content-Length: +1", body=b"x")
    twice = raw("Transfer-Encoding: chunked, chunked", body=b"0\r\n\r\n")
    hidden = raw("Transfer-Encoding : chunked", body=b"0\r\n\r\n")
    for request in (both, two, odd, twice, hidden):
        assert say(door, keys, request).split(b" ")[1] in (b"400", b"501")
    assert not link.seen


def test_a_smuggled_request_is_one_of_its_own(door, keys, link):
    second = raw("Content-Length: 1", target="/v1/control/start-run", body=b"x")
    first = raw("Content-Length: 1", body=b"x").replace(b"Connection: close\r\n", b"")
    heard = say(door, keys, first + second)
    assert [line.split(b" ")[1] for line in heard.split(b"\r\n") if b"HTTP/1.1 " in line][:1] == [
        b"200"
    ]
    assert b" 403 " in heard
    assert [path for _, path, *_ in link.seen] == [PULL]


def test_headers_are_bounded(door, keys, link):
    large = raw("Content-Length: 0", f"flwr-x: {'x' * 70000}")
    assert say(door, keys, large).split(b" ")[1] in (b"400", b"431", b"414")
    assert not link.seen


def test_many_headers_are_refused(keys, link):
    scope = {"type": "http", "method": "POST", "raw_path": PULL.encode(), "query_string": b""}
    with pytest.raises(gate_rules.Refused, match="more than 64 headers"):
        gate_rules.body_length({**scope, "headers": [(b"flwr-x", b"")] * 65}, RequestLimits())


@contextlib.contextmanager
def plain_gate(tmp_path, *options):
    with standing_in() as link, gate_process(tmp_path, "--upstream", link.url, *options) as door:
        yield link, door


def test_bodies_stream_both_ways(tmp_path):
    with plain_gate(tmp_path) as (link, door):
        received = threading.Event()

        def answer(handler):
            handler.send_response(200)
            handler.send_header("transfer-encoding", "chunked")
            handler.end_headers()
            handler.wfile.write(b"5\r\nfirst\r\n")
            assert received.wait(15)
            handler.wfile.write(b"4\r\nlast\r\n0\r\n\r\n")

        link.answer = answer
        size = 2**21
        with contextlib.closing(socket.create_connection(split(door), 20)) as node:
            node.sendall(raw(f"Content-Length: {size}", target=PUSH) + b"x" * (size - 1))
            # The SuperLink has the beginning before the node has sent the end.
            assert link.arriving.wait(15)
            node.sendall(b"x")
            heard = b""
            while chunk := node.recv(65536):
                heard += chunk
                if b"first" in heard:
                    assert b"last" in heard or not received.is_set()
                    received.set()
        assert b"first" in heard and b"last" in heard
        [(_, _, _, body)] = link.seen
        assert len(body) == size


def test_a_body_in_chunks_is_refused(door, keys, link, request):
    """With extensions, a byte at a time, or as it should be: Flower's nodes send none."""
    if "nginx" in request.node.name:
        pytest.skip("nginx puts the chunks together, on its disk")
    for body in (b"1\r\nx\r\n0\r\n\r\n", b"1;a=" + b"b" * 300 + b"\r\nx\r\n", b"1\r\n" * 99, b""):
        heard = say(door, keys, raw("Transfer-Encoding: chunked", body=body))
        assert heard.split(b" ")[1] in (b"411", b"400"), heard
    assert not link.seen


def test_an_answer_that_breaks_off_is_no_whole_answer(tmp_path):
    with plain_gate(tmp_path) as (link, door):

        def answer(handler):
            handler.send_response(200)
            handler.send_header("content-length", "10")
            handler.end_headers()
            handler.wfile.write(b"half")
            handler.close_connection = True

        link.answer = answer
        with pytest.raises(httpx.RemoteProtocolError):
            httpx.post(f"http://{door}{PULL}", content=b"x")
        link.answer = None
        assert httpx.post(f"http://{door}{PULL}", content=b"x").content == b"x"


def in_process(app, content=b"x", headers=None):
    async def post():
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://gate") as client:
            reply = await client.post(PULL, content=content, headers=headers)
        await app.client.aclose()
        return reply

    return asyncio.run(post())


def test_a_node_may_try_again_while_the_superlink_is_away(keys):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        limits = RequestLimits(idle_seconds=0.2)
        reply = in_process(gate.app(f"http://{address}", None, limits))
        assert (reply.status_code, "took too long" in reply.text) == (504, True)
    reply = in_process(gate.app(f"http://{address}", None))
    assert (reply.status_code, "cannot be reached" in reply.text) == (502, True)


def stated(chunks, length):
    """A body in chunks, with the length that a node states."""
    return {"content": chunks, "headers": {"content-length": str(length)}}


def test_a_node_that_says_nothing_more_is_let_go(keys, link):
    limits = RequestLimits(window_seconds=0.2)

    async def stuck():
        yield b"x"
        await asyncio.sleep(1)
        yield b"y"

    reply = in_process(gate.app(link.url, keys.ca, limits), **stated(stuck(), 2))
    assert (reply.status_code, "Too little of the body" in reply.text) == (408, True)
    assert not link.seen


def test_a_node_that_dawdles_is_let_go(keys, link):
    limits = RequestLimits(window_seconds=0.3, window_bytes=50)

    async def trickle(bytes_a_step):
        for _ in range(30):
            yield b"x" * bytes_a_step
            await asyncio.sleep(0.03)

    reply = in_process(gate.app(link.url, keys.ca, limits), **stated(trickle(1), 30))
    assert (reply.status_code, "Too little of the body" in reply.text) == (408, True)
    assert not link.seen
    reply = in_process(gate.app(link.url, keys.ca, limits), **stated(trickle(50), 1500))
    assert reply.status_code == 200
    limits = RequestLimits(seconds=0.3)
    reply = in_process(gate.app(link.url, keys.ca, limits), **stated(trickle(1), 30))
    assert (reply.status_code, "took too long" in reply.text) == (504, True)


def test_another_superlink_is_not_spoken_to(tmp_path, link):
    other = make_server(tmp_path / "other", [])
    assert in_process(gate.app(link.url, other.ca)).status_code == 502
    assert not link.seen


def test_tls_is_new_enough_and_asked_for(door, keys, link):
    host, _, port = door.partition(":")
    for version, fits in ((ssl.TLSVersion.TLSv1_2, True), (ssl.TLSVersion.TLSv1_1, False)):
        context = ssl.create_default_context(cafile=keys.ca)
        context.set_ciphers("ALL:@SECLEVEL=0")
        with pytest.warns(DeprecationWarning) if not fits else contextlib.nullcontext():
            context.minimum_version = context.maximum_version = version
        greet = pytest.raises(OSError) if not fits else contextlib.nullcontext()
        with socket.create_connection((host, int(port)), 20) as plain, greet:
            context.wrap_socket(plain, server_hostname="localhost").close()
    with contextlib.suppress(httpx.TransportError):
        assert httpx.post(f"http://{door}{PULL}", content=b"x").status_code == 400
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        httpx.post(f"https://{door}{PULL}", content=b"x")
    assert not link.seen


@pytest.mark.parametrize(
    "upstream, verified, why",
    [
        ("127.0.0.1:8000", False, "not the address of a SuperLink"),
        ("http://127.0.0.1", False, "not the address of a SuperLink"),
        ("http://127.0.0.1:8000/v1", False, "not the address of a SuperLink"),
        ("http://me@127.0.0.1:8000", False, "not the address of a SuperLink"),
        ("unix:///run/superlink", False, "not the address of a SuperLink"),
        ("http://10.0.0.1:8000", False, "plain HTTP only to a SuperLink on its own machine"),
        ("http://example.org:8000", False, "plain HTTP only to a SuperLink on its own machine"),
        ("https://127.0.0.1:8000", False, "an https address needs one"),
        ("http://127.0.0.1:8000", True, "an http address has no use for it"),
    ],
)
def test_what_is_no_superlink_is_refused(keys, upstream, verified, why):
    with pytest.raises(ValueError, match=why):
        gate.app(upstream, keys.ca if verified else None)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org", ""])
def test_nothing_listens_on_the_network_without_tls(link, keys, host):
    with pytest.raises(ValueError, match="without TLS"):
        gate.serve(gate.app(link.url, keys.ca), host, 0, None)


def test_an_open_key_is_not_served_with(tmp_path, link):
    made = make_server(tmp_path / "server", [])
    made.key.chmod(0o644)
    with pytest.raises(ValueError, match="chmod 600"):
        gate.serve(gate.app(link.url, made.ca), "127.0.0.1", 0, made)


def test_the_gate_is_light():
    code = "import sys, flexlora.deployment.flower.gate as g; print({*sys.modules} & {*sys.argv})"
    said = subprocess.check_output([sys.executable, "-c", code, "torch", "flwr", "transformers"])
    assert said.strip() == b"set()"


APP = {
    "pyproject.toml": """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "echo"
version = "1.0.0"
description = "A message there and back"
license = "Apache-2.0"
dependencies = []
[tool.flwr.app]
publisher = "tests"
[tool.flwr.app.components]
serverapp = "echo:server"
clientapp = "echo:client"
[tool.flwr.app.config]
bytes = 0
""",
    "echo.py": """
import time
import numpy
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

client = ClientApp()
server = ServerApp()

@client.train()
def turn(message, context):
    return Message(message.content, reply_to=message)

@server.main()
def main(grid, context):
    while not (nodes := list(grid.get_node_ids())):
        time.sleep(0.5)
    sent = numpy.arange(context.run_config["bytes"], dtype=numpy.uint8)
    content = RecordDict({"a": ArrayRecord({"a": Array(sent)})})
    [reply] = grid.send_and_receive([Message(content, nodes[0], MessageType.TRAIN)], timeout=100)
    assert numpy.array_equal(reply.content["a"]["a"].numpy(), sent)
""",
}


@contextlib.contextmanager
def started(command, env, log):
    """A process in a group of its own, ended with all that it started."""
    import psutil

    with log.open("wb") as out:
        process = subprocess.Popen(
            [str(Path(sys.executable).parent / command[0]), *map(str, command[1:])],
            env=env,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        family = []
        if process.poll() is None:
            # What the SuperLink starts is in groups of its own.
            family = psutil.Process(process.pid).children(recursive=True)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for member in psutil.wait_procs(family, 5)[1]:
            member.kill()


def eventually(check, seconds=60):
    until = time.monotonic() + seconds
    while not (found := check()):
        assert time.monotonic() < until, f"not within {seconds} s"
        time.sleep(0.3)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gate", "nginx"])
def test_flower_through_the_gate(kind, tmp_path):
    """Real processes: what a node may and may not do, what an outsider with ca.crt may not."""
    keys = make_server(tmp_path / "server", [])
    nodes, home = tmp_path / "nodes", tmp_path / "flwr"
    alpha = make_node(nodes, "alpha")
    make_node(nodes, "stranger")
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("", 0)) as two:
        port, runtime = one.getsockname()[1], two.getsockname()[1]
    env = {
        **{name: value for name, value in os.environ.items() if not name.startswith("FLWR_")},
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    }
    app = tmp_path / "echo"
    app.mkdir()
    for name, text in APP.items():
        (app / name).write_text(text)
    files = ("--ca", keys.ca, "--cert", keys.certificate, "--key", keys.key)
    link = SuperLink(f"https://127.0.0.1:{port}")
    folder = tmp_path / kind
    folder.mkdir()
    superlink = [
        *("flower-superlink", "--host", "127.0.0.1", "--port", port, "--enable-supernode-auth"),
        *("--ssl-ca-certfile", keys.ca, "--ssl-certfile", keys.certificate),
        *("--ssl-keyfile", keys.key, "--database", tmp_path / "state.db"),
    ]

    def supernode(*options):
        address = ("--superlink", door, "--root-certificates", keys.ca, "--port", runtime)
        return ["flower-supernode", *address, *options]

    def flwr(*words):
        return subprocess.run(
            [str(Path(sys.executable).parent / "flwr"), *map(str, words)],
            env=env,
            capture_output=True,
            text=True,
            timeout=120,
        )

    def wanted(*words):
        said = flwr(*words, "--format", "json")
        assert said.returncode == 0, said.stdout + said.stderr
        return json.loads(said.stdout)

    def status():
        return [held["status"] for held in wanted("supernode", "list", "direct")["nodes"]]

    with contextlib.ExitStack() as stack:
        stack.enter_context(started(superlink, env, tmp_path / "superlink.log"))
        door = stack.enter_context(
            gate_process(folder, "--upstream", link.url, *files)
            if kind == "gate"
            else nginx_process(folder, keys, link)
        )
        home.mkdir(exist_ok=True)
        (home / "config.toml").write_text(
            "[superlink]\ndefault = 'direct'\n"
            f"[superlink.direct]\naddress = '127.0.0.1:{port}'\nroot-certificates = '{keys.ca}'\n"
            f"[superlink.gate]\naddress = '{door}'\nroot-certificates = '{keys.ca}'\n"
        )
        eventually(lambda: b"Uvicorn running" in (tmp_path / "superlink.log").read_bytes())

        # An outsider who has the CA certificate, as every node has.
        for words in (
            ("supernode", "register", alpha, "gate"),
            ("supernode", "list", "gate"),
            ("ls", "gate"),
            ("run", app, "gate"),
        ):
            said = flwr(*words)
            assert said.returncode != 0
            assert "requests of a registered Flower node" in said.stdout + said.stderr
        assert not wanted("supernode", "list", "direct")["nodes"]

        # Not registered: with a key of its own making, and with none.
        for options, reason in (
            (("--auth-supernode-private-key", nodes / "stranger.key"), "Failed to activate"),
            ((), "send a public key"),
        ):
            log = tmp_path / "refused.log"
            with started(supernode(*options), env, log) as process:
                assert process.wait(60) == 1
            assert "Exit Code: 305" in log.read_text()
            assert reason in log.read_text()
        assert not wanted("supernode", "list", "direct")["nodes"]

        # The server's owner, on the machine itself; then the node comes, works, and leaves.
        wanted("supernode", "register", alpha, "direct")
        log = tmp_path / "supernode.log"
        node = supernode("--auth-supernode-private-key", nodes / "alpha.key")
        with started(node, env, log):
            eventually(lambda: status() == ["online"])
            run = wanted("run", app, "direct", "--run-config", "bytes=12000000")
            assert run["success"]
            eventually(
                lambda: "finished:completed" in json.dumps(wanted("ls", "direct")), seconds=120
            )
        assert status() == ["offline"]
