"""Certificates that end: said before, renewed while a gate shows them, and named when they have."""

import http.client
import os
import shutil
import ssl
import time
from datetime import UTC, datetime, timedelta

import pytest

pytest.importorskip("flwr", reason="needs the extra 'flower'")

from flexlora.cli.deploy import make_keys
from flexlora.deployment import certificates, key_files
from flexlora.deployment.certificates import ServerKeys, make_server, renew_server
from flexlora.deployment.flower.served_certificate import ServedCertificate
from flexlora.deployment.keys import NodeKey, make_node
from flexlora.deployment.node import preflight
from flexlora.deployment.node.preflight import Fault
from flexlora.deployment.server.run_files import ARRIVALS, certificate_notes
from support.certificates import dated
from support.gate import Signer, registering, split, standing_in, started_gate


@pytest.fixture
def keys(tmp_path):
    return make_server(tmp_path / "server", ["fed.example.org", "10.1.2.3"])


@pytest.fixture
def client(tmp_path, keys):
    make_node(tmp_path / "client", "ash")
    shutil.copy(keys.ca, tmp_path / "client")
    return NodeKey.of(tmp_path / "client")


def names(path):
    certificate = key_files.load_certificate(path)
    return [name.value for name in certificates._names(certificate)]


def test_a_renewed_certificate_has_the_names_the_key_and_the_ca_of_the_old_one(keys):
    dated(keys.certificate, -99, 99)
    before = {path: path.read_bytes() for path in keys.key.parent.iterdir()}
    renewed = renew_server(keys.key.parent, ["new.example.org"])
    assert (renewed.keys, renewed.ca_expired) == (keys, None)
    assert keys.expires - datetime.now(UTC) > timedelta(days=729)
    changed = {p for p in keys.key.parent.iterdir() if before.get(p) != p.read_bytes()}
    assert changed == {keys.certificate}
    assert [str(name) for name in names(keys.certificate)] == [
        *("fed.example.org", "10.1.2.3", "localhost", "127.0.0.1", "new.example.org")
    ]
    assert keys.certificate.stat().st_mode & 0o777 == 0o644


def test_an_expired_certificate_is_renewed_as_well(keys):
    dated(keys.certificate, -99, -9)
    with pytest.raises(ValueError, match=r"server\.crt expired on .*flexlora keys .* --renew"):
        ServerKeys.of(keys.key.parent)
    renew_server(keys.key.parent)
    assert ServerKeys.of(keys.key.parent) == keys


@pytest.mark.parametrize("left", [3600, -5])
def test_a_ca_is_renewed_with_its_key_so_that_both_are_taken(keys, tmp_path, left):
    """Expired, or within the life of the server's certificate."""
    dated(keys.ca, -99, left)
    old = tmp_path / "old.crt"
    shutil.copy(keys.ca, old)
    renewed = renew_server(keys.key.parent)
    assert renewed.ca_expired == key_files.load_certificate(old).not_valid_after_utc
    server = key_files.load_certificate(keys.certificate)
    for ca in (old, keys.ca):
        server.verify_directly_issued_by(key_files.load_certificate(ca))
    assert server.not_valid_after_utc - datetime.now(UTC) > timedelta(days=729)
    assert key_files.load_certificate(keys.ca).not_valid_after_utc > datetime.now(UTC) + timedelta(
        days=3650
    )


@pytest.mark.parametrize(
    ("gone", "remedy"),
    [
        ("ca.key", "put the CA's key back there to renew"),
        ("server.crt", "make the server's certificates with"),
        ("server.key", "make the server's certificates with"),
        ("ca.crt", "make the server's certificates with"),
    ],
)
def test_what_is_missing_to_renew_is_named_and_nothing_is_changed(keys, gone, remedy):
    folder = keys.key.parent
    (folder / gone).unlink()
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ValueError, match=f"{gone} is not there; {remedy}"):
        renew_server(folder)
    assert before == {path: path.read_bytes() for path in folder.iterdir()}


def test_the_command_renews(keys, capsys):
    make_keys(keys.key.parent, renew=True)
    said = capsys.readouterr().out
    assert "renewed " in said and "a server that is running takes it within seconds" in said
    dated(keys.ca, -99, 3600)
    make_keys(keys.key.parent, ["b.example.org"], renew=True)
    assert "send it to the clients' owners, who need it from 20" in capsys.readouterr().out


def test_what_is_not_valid_yet_is_said_with_the_clock(keys, client):
    dated(keys.certificate, 3600, 7200)
    with pytest.raises(ValueError, match=r"server\.crt is valid only from .*clock says .* set the"):
        ServerKeys.of(keys.key.parent)
    dated(keys.ca, 3600, 7200)
    shutil.copy(keys.ca, client.ca)
    with pytest.raises(ValueError, match=r"ca\.crt is valid only from .*clock says"):
        NodeKey.of(client.ca.parent)


def test_a_clients_expired_ca_is_to_be_got_from_the_owner(keys, client):
    dated(keys.ca, -99, -9)
    shutil.copy(keys.ca, client.ca)
    with pytest.raises(ValueError, match=r"ca\.crt expired on .*renewed ca\.crt from the server"):
        NodeKey.of(client.ca.parent)


@pytest.mark.parametrize(
    ("days", "words"),
    [
        (31.5, []),
        (29.5, ["expires on", "in 29 days", "without stopping anything: flexlora keys"]),
        (1.5, ["in 1 day;"]),
        (-2, ["expired on", "no client can connect", "--renew"]),
    ],
)
def test_the_end_of_a_certificate_is_said_thirty_days_before(keys, days, words):
    dated(keys.certificate, -(10**6), days * 86400)
    sentences = keys.notices(datetime.now(UTC))
    assert len(sentences) == bool(words)
    assert all(word in sentences[0] for word in words)
    dated(keys.ca, -(10**6), 9.5 * 86400)
    [of_ca] = [s for s in keys.notices(datetime.now(UTC)) if "ca.crt expires" in s]
    assert "send it to every client before that day" in of_ca


def test_notices_come_once_a_day_and_anew_after_a_change(keys, tmp_path):
    dated(keys.certificate, -99, 3600)
    folder, days = tmp_path / "run", [0.0]
    folder.mkdir()
    shown = ServedCertificate(keys, folder, now=lambda: 86400 * days[0])

    def lines():
        return (folder / ARRIVALS).read_text().splitlines()

    for days[0] in (0.0, 0.1, 0.9, 1.1, 1.9, 2.2):
        shown.look()
    assert len(lines()) == 3 and all("in 0 days" in line for line in lines())
    renew_server(keys.key.parent)
    shown.look()
    shown.look()
    assert len(lines()) == 4 and "anew, valid until 20" in lines()[-1]


def test_what_is_said_of_a_certificate_is_also_for_the_journal(keys, tmp_path):
    dated(keys.certificate, -99, 3600)
    folder, days = tmp_path / "run", [0.0]
    folder.mkdir()
    shown = ServedCertificate(keys, folder, now=lambda: 86400 * days[0])
    for days[0] in (0.0, 1.1, 2.2):
        shown.look()
    # The console has it every day, the journal once.
    [note] = certificate_notes(folder).values()
    assert "server.crt expires on" in note.sentence and "--renew" in note.sentence
    assert not note.renewed
    renew_server(keys.key.parent)
    shown.look()
    [note] = certificate_notes(folder).values()
    assert "anew, valid until 20" in note.sentence and note.renewed
    # A gate that was started again does not repeat what is settled.
    ServedCertificate(keys, folder).look()
    assert certificate_notes(folder) == {}


def test_files_that_do_not_fit_are_not_taken(keys, tmp_path):
    other = make_server(tmp_path / "other", [])
    folder = tmp_path / "run"
    folder.mkdir()
    shown = ServedCertificate(keys, folder)
    context = shown.context
    good = keys.certificate.read_bytes()
    spoiled = (other.certificate.read_bytes(), b"", b"-----BEGIN NONSENSE-----", b"x" * 70_000)
    for content in spoiled:
        keys.certificate.write_bytes(content)
        shown.look()
        assert shown.context is context
    assert "are not a certificate and its key" in (folder / ARRIVALS).read_text()
    keys.certificate.unlink()
    shown.look()
    keys.certificate.write_bytes(good)
    keys.key.chmod(0o644)
    shown.look()
    assert shown.context is context
    keys.key.chmod(0o600)
    os.utime(keys.key)
    shown.look()
    assert shown.context is not context


# A gate that serves meanwhile


def shown_until(address, ca):
    context = ssl.create_default_context(cafile=ca)
    connection = http.client.HTTPSConnection(*split(address), timeout=20, context=context)
    try:
        connection.connect()
        ends = connection.sock.getpeercert()["notAfter"]
    finally:
        connection.close()
    return ssl.cert_time_to_seconds(ends)


def eventually(check, seconds=30):
    until = time.monotonic() + seconds
    while not (value := check()):
        assert time.monotonic() < until, f"not within {seconds} s"
        time.sleep(0.2)
    return value


@pytest.mark.slow
def test_a_certificate_expires_and_is_renewed_while_the_gate_serves(keys, client, tmp_path):
    """And a connection that a node has is not cut."""
    node = Signer(key_files.read_private_key(client.key, openssh=True))
    run = registering(tmp_path / "run", node)
    internal = certificates.make_internal(tmp_path / "internal")
    assert not (tmp_path / "internal" / "ca.key").exists()
    dated(keys.certificate, -99, 5)
    options = ("--ca", keys.ca, "--cert", keys.certificate, "--key", keys.key, "--run", run)
    with (
        standing_in(internal) as link,
        started_gate(tmp_path, "--upstream", link.url, "--upstream-ca", internal.ca, *options) as (
            address,
            _,
        ),
    ):
        address = address.replace("127.0.0.1", "localhost")
        greeting = preflight.greet(address, client)
        assert "the server's certificate expires on" in greeting.notes[0]
        assert "flexlora keys DIR --renew" in greeting.notes[0]
        context = ssl.create_default_context(cafile=keys.ca)
        held = http.client.HTTPSConnection(*split(address), timeout=20, context=context)

        def works():
            held.request("POST", "/v1/fleet/pull-messages", b"x", node.headers())
            return held.getresponse().read() == b"x"

        def expired():
            assert works()
            fault = preflight.greet(address, client)
            return isinstance(fault, Fault) and fault

        fault = eventually(expired)
        assert not fault.is_final  # a client goes on trying
        assert "has expired: its owner renews it, while the server runs" in fault.sentence
        assert "flexlora keys DIR --renew" in fault.sentence and "clock" in fault.sentence
        lines = (run / ARRIVALS).read_text()
        assert "in 0 days; renew it, without stopping anything" in lines
        assert works()
        renew_server(keys.key.parent)
        eventually(lambda: not isinstance(preflight.greet(address, client), Fault))
        assert preflight.greet(address, client).notes == ()
        assert shown_until(address, keys.ca) > time.time() + 700 * 86400
        assert works()
        held.close()


def test_a_clients_clock_that_flower_would_refuse_is_named(keys, client, tmp_path, monkeypatch):
    node = Signer(key_files.read_private_key(client.key, openssh=True))
    run = registering(tmp_path / "run", node)
    options = ("--ca", keys.ca, "--cert", keys.certificate, "--key", keys.key, "--run", run)
    with (
        standing_in(keys) as link,
        started_gate(tmp_path, "--upstream", link.url, *options) as (address, _),
    ):
        address = address.replace("127.0.0.1", "localhost")
        assert preflight.greet(address, client).notes == ()

        for ahead, side in ((-400, "behind"), (10, "ahead of")):

            class Clock(datetime):
                @classmethod
                def now(cls, zone=None):
                    return datetime.now(zone) + timedelta(seconds=ahead)  # noqa: B023

            monkeypatch.setattr(preflight, "datetime", Clock)
            fault = preflight.greet(address, client)
            assert isinstance(fault, Fault) and not fault.is_final
            assert fault.sentence.startswith("The clock of this machine is ")
            assert f"{side} the server's" in fault.sentence and "NTP" in fault.sentence


@pytest.mark.slow
def test_a_certificate_that_is_not_valid_yet_is_named_to_a_client(keys, client, tmp_path):
    run = registering(tmp_path / "run")
    dated(keys.certificate, 3600, 7200)
    options = ("--ca", keys.ca, "--cert", keys.certificate, "--key", keys.key, "--run", run)
    with (
        standing_in() as link,
        started_gate(tmp_path, "--upstream", link.url, *options) as (address, _),
    ):
        fault = preflight.greet(address.replace("127.0.0.1", "localhost"), client)
    assert not fault.is_final
    assert "is not valid yet: check the clock of this machine" in fault.sentence
