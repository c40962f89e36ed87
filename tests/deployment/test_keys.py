import os
import socket
import ssl
import threading
from argparse import Namespace
from datetime import UTC, datetime, timedelta
from importlib import import_module
from ipaddress import ip_address

import pytest

pytest.importorskip("cryptography", reason="needs the extra 'flower'")

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import ExtendedKeyUsageOID

from flexlora.deployment import certificates, key_files
from flexlora.deployment.certificates import ServerKeys, make_server
from flexlora.deployment.keys import (
    NODES,
    NodeKey,
    admit,
    fingerprint,
    fingerprint_of_private,
    make_node,
    node_keys,
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("keys") / "server"
    return make_server(folder, ["fed.example.org", "10.11.12.13", "localhost"])


def certificate(path):
    return x509.load_pem_x509_certificate(path.read_bytes())


def mode(path):
    return path.stat().st_mode & 0o777


def greet(made, name, ca=None):
    """A TLS handshake with the server's files, checked as strictly as Python 3.13 does."""
    client = ssl.create_default_context(cafile=ca or made.ca)
    client.verify_flags |= ssl.VERIFY_X509_STRICT
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(made.certificate, made.key)
    left, right = socket.socketpair()

    def answer():
        try:
            with server.wrap_socket(right, server_side=True) as link:
                link.recv(1)
        except OSError:
            right.close()

    thread = threading.Thread(target=answer)
    thread.start()
    try:
        with client.wrap_socket(left, server_hostname=name) as link:
            link.send(b"x")
            return link.version()
    finally:
        left.close()
        thread.join()


def test_the_certificate_says_what_a_server_is(made):
    held = certificate(made.certificate)
    names = held.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["fed.example.org", "localhost"]
    addresses = names.get_values_for_type(x509.IPAddress)
    assert addresses == [ip_address("10.11.12.13"), ip_address("127.0.0.1")]
    assert not held.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    usage = held.extensions.get_extension_for_class(x509.KeyUsage).value
    assert usage.digital_signature and not usage.key_cert_sign
    uses = held.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(uses) == [ExtendedKeyUsageOID.SERVER_AUTH]
    left = held.not_valid_after_utc - datetime.now(UTC)
    assert timedelta(days=729) < left <= timedelta(days=730)
    assert made.expires == held.not_valid_after_utc


def test_the_ca_signs_and_nothing_else(made):
    ca = certificate(made.ca)
    limits = ca.extensions.get_extension_for_class(x509.BasicConstraints)
    assert limits.critical and limits.value.ca and limits.value.path_length == 0
    usage = ca.extensions.get_extension_for_class(x509.KeyUsage).value
    assert usage.key_cert_sign and not usage.digital_signature
    assert ca.not_valid_after_utc - datetime.now(UTC) > timedelta(days=3650)


def test_private_files_are_private(made):
    folder = made.key.parent
    assert mode(folder) == 0o700
    assert mode(folder / "ca.key") == mode(made.key) == 0o600
    assert sorted(path.name for path in folder.iterdir()) == [
        "ca.crt",
        "ca.key",
        "server.crt",
        "server.key",
    ]


@pytest.mark.parametrize("name", ["fed.example.org", "10.11.12.13", "localhost", "127.0.0.1"])
def test_a_client_with_the_ca_accepts_the_server(made, name):
    assert greet(made, name) in ("TLSv1.2", "TLSv1.3")


def test_a_client_refuses_another_name_and_another_ca(made, tmp_path):
    with pytest.raises(ssl.SSLCertVerificationError, match="mismatch"):
        greet(made, "other.example.org")
    other = make_server(tmp_path / "other", [])
    with pytest.raises(ssl.SSLCertVerificationError):
        greet(made, "localhost", other.ca)


def test_nothing_is_overwritten(made):
    before = {path: path.read_bytes() for path in made.key.parent.iterdir()}
    with pytest.raises(ValueError, match=r"server\.crt is there already .* move it away first"):
        make_server(made.key.parent, ["fed.example.org"])
    assert before == {path: path.read_bytes() for path in made.key.parent.iterdir()}


def test_a_renewed_certificate_is_of_the_same_ca(tmp_path):
    first = make_server(tmp_path / "server", ["a.example.org"])
    ca, key, old = (path.read_bytes() for path in (first.ca, first.key, first.certificate))
    first.certificate.unlink()
    second = make_server(tmp_path / "server", ["b.example.org"])
    assert (second.ca.read_bytes(), second.key.read_bytes()) == (ca, key)
    assert second.certificate.read_bytes() != old
    assert greet(second, "b.example.org")
    second.certificate.unlink()
    second.key.unlink()
    assert make_server(tmp_path / "server", []).key.read_bytes() != key
    assert second.ca.read_bytes() == ca


def test_a_certificate_does_not_outlive_its_ca(tmp_path, monkeypatch):
    monkeypatch.setattr(certificates, "_CA_DAYS", 30)
    made = make_server(tmp_path / "server", [])
    assert made.expires == certificate(made.ca).not_valid_after_utc


@pytest.mark.parametrize("gone, here", [("ca.key", "ca.crt"), ("ca.crt", "ca.key")])
def test_half_a_ca_is_refused(tmp_path, gone, here):
    folder = make_server(tmp_path / "server", []).key.parent
    (folder / "server.crt").unlink()
    (folder / gone).unlink()
    with pytest.raises(ValueError, match=f"{here} is there but .*{gone} is not"):
        make_server(folder, [])
    assert not (folder / gone).exists()


def test_an_open_folder_gets_no_keys(tmp_path):
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(0o755)
    for make in (lambda: make_server(folder, []), lambda: make_node(folder, "alpha")):
        with pytest.raises(ValueError, match=f"open to other users.*chmod 700 {folder}"):
            make()
    assert not list(folder.iterdir())


@pytest.mark.parametrize(
    "host",
    [
        "",
        "https://a.org",
        "a.org:8443",
        "a b",
        "a/b",
        "-a.org",
        "a..org",
        "ä.org",
        "a.org\n",
        "x" * 64 + ".org",
        "10.0.0.256",
        "10.0.0.0/8",
    ],
)
def test_what_is_no_host_is_refused(tmp_path, host):
    with pytest.raises(ValueError, match="neither a DNS name nor an IP address"):
        make_server(tmp_path / "server", [host])
    assert not (tmp_path / "server").exists()


def test_the_server_finds_its_files(made):
    assert ServerKeys.of(made.key.parent) == made


@pytest.mark.parametrize("name", ["ca.crt", "server.crt", "server.key"])
def test_a_missing_file_of_the_server_is_named(tmp_path, name):
    folder = make_server(tmp_path / "server", []).key.parent
    (folder / name).unlink()
    with pytest.raises(ValueError, match=f"{name} is not there; .*flexlora keys {folder}"):
        ServerKeys.of(folder)


def test_files_that_do_not_belong_together_are_refused(tmp_path):
    one, two = make_server(tmp_path / "one", []), make_server(tmp_path / "two", [])
    one.ca.write_bytes(two.ca.read_bytes())
    with pytest.raises(ValueError, match=r"server\.crt is not signed by"):
        ServerKeys.of(tmp_path / "one")
    one.key.write_bytes(two.key.read_bytes())
    with pytest.raises(ValueError, match=r"server\.key is not the key of"):
        ServerKeys.of(tmp_path / "one")
    one.key.write_bytes(b"not a key")
    with pytest.raises(ValueError, match="not an unencrypted private key in PEM"):
        ServerKeys.of(tmp_path / "one")
    one.ca.write_bytes(b"x" * 70000)
    with pytest.raises(ValueError, match="more than 65536 bytes"):
        ServerKeys.of(tmp_path / "one")


def test_an_expired_certificate_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(certificates, "_SERVER_DAYS", 0)
    with pytest.raises(ValueError, match=r"server\.crt expired on 20.*flexlora keys"):
        make_server(tmp_path / "server", [])


@pytest.mark.parametrize("bits", [0o640, 0o604, 0o620])
def test_an_open_private_key_is_refused(tmp_path, bits):
    made = make_server(tmp_path / "server", [])
    made.key.chmod(bits)
    with pytest.raises(ValueError, match=f"open to other users .*chmod 600 {made.key}"):
        ServerKeys.of(tmp_path / "server")


def test_flower_takes_both_halves_of_a_nodes_key(tmp_path):
    pytest.importorskip("flwr", reason="needs the extra 'flower'")
    from flwr.cli.supernode.register import try_load_public_key
    from flwr.supercore.primitives.asymmetric import public_key_to_bytes

    flower_supernode = import_module("flwr.supernode.cli.flower_supernode")

    public = make_node(tmp_path / "node", "alpha")
    assert public == tmp_path / "node" / "alpha.pub"
    key = tmp_path / "node" / "alpha.key"
    assert mode(key) == 0o600
    given = Namespace(auth_supernode_private_key=str(key), auth_supernode_public_key=None)
    _, theirs = flower_supernode._try_setup_client_authentication(given)
    assert public_key_to_bytes(theirs) == try_load_public_key(public)
    assert theirs.curve.name == "secp384r1"


@pytest.mark.parametrize("name", ["a", "node-7_b.v2", "0", "_x", "A" * 64])
def test_names_of_nodes(tmp_path, name):
    public = make_node(tmp_path / "node", name)
    assert node_keys(tmp_path / "node") == {name: public}
    (tmp_path / "node" / "ca.crt").write_bytes(make_server(tmp_path / "server", []).ca.read_bytes())
    assert NodeKey.of(tmp_path / "node") == NodeKey(
        name, tmp_path / "node" / f"{name}.key", tmp_path / "node" / "ca.crt"
    )


@pytest.mark.parametrize(
    "name", ["", ".a", "-a", "a/b", "..", "a b", "ä", "a\n", "A" * 65, "ca", "Server", "a\0"]
)
def test_what_is_no_name_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match="cannot be a node's name"):
        make_node(tmp_path / "node", name)
    assert not (tmp_path / "node").exists()


def test_a_nodes_key_is_not_overwritten(tmp_path):
    public = make_node(tmp_path, "alpha")
    before = public.read_bytes()
    with pytest.raises(ValueError, match=r"alpha\.key is there already"):
        make_node(tmp_path, "alpha")
    (tmp_path / "alpha.key").unlink()
    with pytest.raises(ValueError, match=r"alpha\.pub is there already"):
        make_node(tmp_path, "alpha")
    assert public.read_bytes() == before


def test_one_folder_may_hold_everything(tmp_path):
    made = make_server(tmp_path / "all", [])
    make_node(tmp_path / "all", "beta")
    make_node(tmp_path / "all", "alpha")
    assert list(node_keys(tmp_path / "all")) == ["alpha", "beta"]
    with pytest.raises(ValueError, match=r"several nodes \(alpha, beta\)"):
        NodeKey.of(tmp_path / "all")
    assert NodeKey.of(tmp_path / "all", "beta").key == tmp_path / "all" / "beta.key"
    assert NodeKey.of(tmp_path / "all", "beta").ca == made.ca
    with pytest.raises(ValueError, match="cannot be a node's name"):
        NodeKey.of(tmp_path / "all", "ca")


def test_a_node_is_told_what_it_lacks(tmp_path, made):
    with pytest.raises(ValueError, match=r"no NAME\.key in .*flexlora keys .* --node NAME"):
        NodeKey.of(tmp_path)
    make_node(tmp_path, "alpha")
    with pytest.raises(ValueError, match=r"no beta\.key in .*--node beta"):
        NodeKey.of(tmp_path, "beta")
    with pytest.raises(ValueError, match=r"ca\.crt is not there; get the server's"):
        NodeKey.of(tmp_path)
    (tmp_path / "ca.crt").write_bytes(made.ca.read_bytes())
    (tmp_path / "alpha.key").chmod(0o644)
    with pytest.raises(ValueError, match="chmod 600"):
        NodeKey.of(tmp_path)


def test_a_nodes_key_in_another_format_is_refused(tmp_path, made):
    make_node(tmp_path, "alpha")
    (tmp_path / "ca.crt").write_bytes(made.ca.read_bytes())
    (tmp_path / "alpha.key").write_bytes(made.key.read_bytes())
    with pytest.raises(ValueError, match="not an unencrypted private key in OpenSSH"):
        NodeKey.of(tmp_path)


def test_public_keys_that_are_none_are_refused(tmp_path):
    make_node(tmp_path, "alpha")
    (tmp_path / "beta.pub").write_bytes(b"ssh-rsa nonsense")
    with pytest.raises(ValueError, match=r"beta\.pub is not an OpenSSH public key"):
        node_keys(tmp_path)
    other = rsa.generate_private_key(65537, 2048).public_key()
    openssh = serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    (tmp_path / "beta.pub").write_bytes(other.public_bytes(*openssh))
    with pytest.raises(ValueError, match=r"beta\.pub is not an elliptic-curve key"):
        node_keys(tmp_path)
    (tmp_path / "beta.pub").write_bytes((tmp_path / "alpha.pub").read_bytes())
    with pytest.raises(ValueError, match=r"beta\.pub is the same key as alpha\.pub"):
        node_keys(tmp_path)


def test_a_folder_that_others_fill_lets_nobody_join(tmp_path):
    make_node(tmp_path, "alpha")
    tmp_path.chmod(0o770)
    with pytest.raises(ValueError, match=f"chmod go-w {tmp_path}"):
        node_keys(tmp_path)
    with pytest.raises(ValueError, match="is not a folder"):
        node_keys(tmp_path / "alpha.pub")


def test_keys_are_private_whatever_the_mask(tmp_path):
    before = os.umask(0)
    try:
        made = make_server(tmp_path / "server", [])
    finally:
        os.umask(before)
    assert (mode(made.key), mode(made.ca), mode(made.key.parent)) == (0o600, 0o644, 0o700)


# Admitting


@pytest.fixture
def server_folder(tmp_path):
    (tmp_path / "server" / NODES).mkdir(mode=0o700, parents=True)
    return tmp_path / "server"


def test_a_client_is_admitted_by_its_public_key(server_folder, tmp_path):
    public = make_node(tmp_path / "mary", "mary")
    assert admit(server_folder, public) == "mary"
    copied = node_keys(server_folder / NODES)["mary"]
    assert fingerprint(copied) == fingerprint(public)
    assert fingerprint_of_private(tmp_path / "mary" / "mary.key") == fingerprint(public)
    assert admit(server_folder, public) == "mary"  # twice is no fault


def test_only_a_new_name_with_a_new_key_is_admitted(server_folder, tmp_path):
    public = make_node(tmp_path / "mary", "mary")
    admit(server_folder, public)
    other = make_node(tmp_path / "other", "mary")
    with pytest.raises(ValueError, match=r"mary\.pub is the key of client mary, another than"):
        admit(server_folder, other)
    copy = tmp_path / "north.pub"
    copy.write_bytes(public.read_bytes())
    with pytest.raises(ValueError, match=r"the same as .*north\.pub; each client needs a key"):
        admit(server_folder, copy)
    assert list(node_keys(server_folder / NODES)) == ["mary"]


@pytest.mark.parametrize("content", [b"", b"ssh-rsa AAAA", b"\xff" * 70000])
def test_what_is_no_public_key_admits_nobody(server_folder, tmp_path, content):
    (tmp_path / "mary.pub").write_bytes(content)
    with pytest.raises(ValueError, match=r"mary\.pub"):
        admit(server_folder, tmp_path / "mary.pub")
    assert node_keys(server_folder / NODES) == {}


def test_a_private_key_is_not_admitted(server_folder, tmp_path):
    make_node(tmp_path / "mary", "mary")
    with pytest.raises(ValueError, match=r"mary\.key is not an OpenSSH public key"):
        admit(server_folder, tmp_path / "mary" / "mary.key")
    with pytest.raises(ValueError, match=r"give the file NAME\.pub"):
        admit(server_folder, tmp_path / "nowhere.pub")


def test_a_client_is_admitted_to_a_server_alone(tmp_path):
    public = make_node(tmp_path / "mary", "mary")
    with pytest.raises(ValueError, match="does not hold a server's keys; make them first"):
        admit(tmp_path / "mary", public)


@pytest.mark.parametrize(
    ("read", "remedy"),
    [(key_files.read_public_key, r"NAME\.pub"), (key_files.load_certificate, "--host")],
)
def test_a_file_of_another_kind_is_refused_with_the_remedy_and_no_foreign_words(
    tmp_path, read, remedy
):
    file = tmp_path / "other"
    file.write_bytes(b"-----BEGIN NONSENSE-----\n")
    with pytest.raises(ValueError, match=remedy) as refused:
        read(file)
    assert "BEGIN" not in str(refused.value)
