"""Flower's own node signs as the gate expects, and signs every attempt anew."""

import random

import pytest

pytest.importorskip("flwr", reason="needs the extra 'flower'")

import httpx
from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_HEADER, TIMESTAMP_TOLERANCE
from flwr.proto.fleet_pb2 import PullMessagesRequest
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.retry import make_simple_http_retry_invoker
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from flexlora.deployment.flower import signatures
from flexlora.deployment.flower.gate_rules import Refused
from flexlora.deployment.flower.signatures import RegisteredKeys, Signatures
from flexlora.deployment.server import run_files
from support.gate import Signer, registering

PULL = b"/v1/fleet/pull-messages"


@pytest.fixture
def node():
    return Signer()


@pytest.fixture
def checked(node, tmp_path):
    return Signatures(RegisteredKeys(registering(tmp_path / "run", node)))


def raw(headers):
    return [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]


def test_the_headers_and_the_times_are_flowers():
    ours = (signatures.KEY_HEADER, signatures.TIME_HEADER, signatures.SIGNATURE_HEADER)
    theirs = (FLEET_HTTP_PUBLIC_KEY_HEADER, TIMESTAMP_HEADER, FLEET_HTTP_SIGNATURE_HEADER)
    assert ours == tuple(name.encode() for name in theirs)
    assert signatures.EARLIEST_SECONDS == -SYSTEM_TIME_TOLERANCE
    assert signatures.LATEST_SECONDS == TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE


def test_flowers_node_signs_every_attempt_anew(node, checked, monkeypatch):
    """Or a request that is repeated after 503 would be taken for a copy."""
    accepted = []

    def answer(request):
        accepted.append(checked.signer(PULL, request.headers.raw))
        return httpx.Response(200 if len(accepted) == 3 else 503)

    retried = make_simple_http_retry_invoker()
    monkeypatch.setattr("flwr.supercore.retry.retry_invoker.time.sleep", lambda _: None)
    interceptor = NodeAuthHttpInterceptor(node.key, node.key.public_key())
    with FleetHttpClient("http://gate", interceptors=[interceptor]) as client:
        client._client = httpx.Client(transport=httpx.MockTransport(answer))
        retried.invoke(client.PullMessages, PullMessagesRequest())
    assert len(accepted) == 3 and len(set(accepted)) == 1


def test_a_time_is_forgotten_when_it_has_lost_its_validity(node, checked, monkeypatch):
    monkeypatch.setattr(signatures, "_MOST_TIMES", 3)
    for _ in range(3):
        checked.signer(PULL, raw(node.headers(seconds_ago=304)))
    with pytest.raises(Refused, match="too many requests"):
        checked.signer(PULL, raw(node.headers()))
    monkeypatch.setattr(signatures, "LATEST_SECONDS", 303.0)
    checked.signer(PULL, raw(node.headers()))
    assert [len(times) for times in checked._times.values()] == [1]


def test_whoever_has_not_signed_costs_no_memory(checked):
    for _ in range(9):
        with pytest.raises(Refused):
            checked.signer(PULL, raw(Signer().headers()))
    assert not checked._keys and not checked._times


def test_spoiled_headers_are_refused_and_never_more(node, checked):
    good, rng, statuses = raw(node.headers()), random.Random(5), set()
    for _ in range(500):
        spoiled = [(name, bytearray(value)) for name, value in good]
        _, value = rng.choice(spoiled[1:])
        for _ in range(rng.randrange(1, 4)):
            value[rng.randrange(len(value))] = rng.randrange(256)
        if rng.random() < 0.3:
            del value[rng.randrange(len(value)) :]
        try:
            checked.signer(PULL, [(name, bytes(value)) for name, value in spoiled])
        except Refused as refused:
            statuses.add(refused.status)
    assert statuses <= {401, 503}


@pytest.mark.parametrize("content", ["", "{", "[]", "7", "null", "[" * 99999])
def test_a_damaged_file_of_keys_changes_nothing(node, checked, tmp_path, content):
    checked.signer(PULL, raw(node.headers()))
    for name in (run_files.NODES, run_files.NUMBERS):
        (tmp_path / "run" / name).write_text(content)
    checked.signer(PULL, raw(node.headers()))
    run_files.write_numbers(tmp_path / "run", run_files.NODES, {})
    with pytest.raises(Refused):
        checked.signer(PULL, raw(node.headers()))
