"""Certificates for the server and a key pair for each node, as Flower takes them.

The server's folder holds ``ca.key``, ``ca.crt``, ``server.key`` and ``server.crt``; a node's
folder holds ``ca.crt``, which the server's owner hands out, ``NAME.key`` and ``NAME.pub``, which
the node's owner hands in. The private files are ``*.key``: they are made 0600, and refused where
others may read them. What the server needs to run is without ``ca.key``, which may be kept
elsewhere until a certificate is to be renewed.
"""

import base64
import hashlib
import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from flexlora.errors import ProtocolError

try:
    from cryptography import x509
    from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
except ImportError as error:
    raise ProtocolError(
        "Certificates and node keys need the package 'cryptography'; install it with: "
        "pip install 'flexlora[flower]'."
    ) from error

_CA_DAYS = 3653
_SERVER_DAYS = 730
# A machine whose clock is behind would refuse a certificate made this very minute.
_CLOCKS_DIFFER = timedelta(hours=1)
_MOST_FILE_BYTES = 65536
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")
_DNS_NAME = re.compile(
    r"(?=.{1,253}\Z)(\*\.)?([A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.)*"
    r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
)
# Their keys would fall on the files of the server where one folder holds everything.
_TAKEN = ("ca", "server")
_REMAKE = "flexlora keys {} --host NAME"
_PrivateKey = ec.EllipticCurvePrivateKey
_PEM, _OPENSSH = serialization.Encoding.PEM, serialization.Encoding.OpenSSH
_PKCS8 = serialization.PrivateFormat.PKCS8


@dataclass(frozen=True)
class ServerKeys:
    """The files a server runs with: the CA's certificate, its own, and its private key."""

    ca: Path
    certificate: Path
    key: Path

    @property
    def expires(self) -> datetime:
        """When the server's certificate does, in UTC; read from its file."""
        return _certificate(self.certificate).not_valid_after_utc

    @staticmethod
    def of(folder: Path) -> "ServerKeys":
        """The files in a folder that `make_server` filled, checked to belong together.

        Raises:
            ProtocolError: one is missing, unreadable, readable by others, expired or of another
                CA.
        """
        ca_path, path, key_path = (
            _found(folder / name, f"make the server's certificates with: {_REMAKE.format(folder)}")
            for name in ("ca.crt", "server.crt", "server.key")
        )
        ca, certificate = _certificate(ca_path), _certificate(path)
        if certificate.public_key() != _private_key(key_path).public_key():
            raise ProtocolError(
                f"{key_path} is not the key of {path}; move both away and make new ones with: "
                f"{_REMAKE.format(folder)}."
            )
        try:
            certificate.verify_directly_issued_by(ca)
        except (ValueError, TypeError, InvalidSignature) as error:
            raise ProtocolError(
                f"{path} is not signed by {ca_path}, so nodes would refuse the server; move it "
                f"away and make a new one with: {_REMAKE.format(folder)}."
            ) from error
        return ServerKeys(ca_path, path, key_path)


@dataclass(frozen=True)
class NodeKey:
    """The files a node runs with: the server's CA certificate and the node's private key."""

    name: str
    key: Path
    ca: Path

    @staticmethod
    def of(folder: Path, name: str | None = None) -> "NodeKey":
        """The files in a node's folder; without ``name`` there must be one node key in it.

        Raises:
            ProtocolError: a file is missing, unreadable or readable by others, or several fit.
        """
        if name is not None:
            _check_name(name)
        held = [path for path in sorted(folder.glob("*.key")) if path.stem not in _TAKEN]
        fit = [path for path in held if name in (None, path.stem)]
        if not fit:
            raise ProtocolError(
                f"There is no {name or 'NAME'}.key in {folder}; make the node's keys with: "
                f"flexlora keys {folder} --node {name or 'NAME'}."
            )
        if len(fit) > 1:
            names = ", ".join(path.stem for path in fit)
            raise ProtocolError(f"{folder} holds the keys of several nodes ({names}); say which.")
        ca = _found(
            folder / "ca.crt",
            "ask the server's owner for the ca.crt that 'flexlora keys' made, and put it there",
        )
        _certificate(ca)
        _private_key(fit[0], openssh=True)
        return NodeKey(fit[0].stem, fit[0], ca)


def make_server(folder: Path, hosts: Sequence[str]) -> ServerKeys:
    """Make a CA and a server certificate for ``hosts``, localhost and 127.0.0.1.

    With a CA already in the folder only what is missing of the server's two files is made, which
    is how a certificate is renewed: nodes keep the ``ca.crt`` they have. The CA lasts ten years,
    a certificate two. Keys are on P-256.

    Raises:
        ProtocolError: a file would be overwritten, the CA is half there or expired, the folder is
            open to others, or a host is neither a DNS name nor an IP address.
    """
    names = [_host(host) for host in dict.fromkeys([*hosts, "localhost", "127.0.0.1"])]
    _make_folder(folder)
    key, certificate = folder / "server.key", folder / "server.crt"
    if certificate.exists():
        raise ProtocolError(
            f"{certificate} is there already and is not overwritten; to renew it with the same "
            "CA, move it away first."
        )
    ca_key, ca = _authority(folder)
    if key.exists():
        server_key = _private_key(key)
    else:
        server_key = ec.generate_private_key(ec.SECP256R1())
        _write(key, _private_bytes(server_key, _PKCS8), 0o600)
    made = _server_certificate(server_key, names, ca_key, ca)
    _write(certificate, made.public_bytes(_PEM), 0o644)
    return ServerKeys.of(folder)


def make_node(folder: Path, name: str) -> Path:
    """Make a node's ``NAME.key`` and ``NAME.pub``; returns the path of the public one.

    Both are OpenSSH files on P-384: the private one is for ``flower-supernode
    --auth-supernode-private-key``, the public one for ``flwr supernode register``.

    Raises:
        ProtocolError: the name does not fit a file, one of the two is there, or the folder is open
            to others.
    """
    _check_name(name)
    _make_folder(folder)
    key, public = folder / f"{name}.key", folder / f"{name}.pub"
    for path in (key, public):
        if path.exists():
            raise ProtocolError(
                f"{path} is there already and is not overwritten; choose another name, or move "
                "it away and have the new public key registered."
            )
    made = ec.generate_private_key(ec.SECP384R1())
    _write(key, _private_bytes(made, serialization.PrivateFormat.OpenSSH), 0o600)
    _write(public, _public_bytes(made.public_key()) + f" {name}\n".encode(), 0o644)
    return public


def node_keys(folder: Path) -> dict[str, Path]:
    """The public keys in a folder by node name, each ``NAME.pub`` checked to be one.

    Whoever may write into the folder decides who may join, so others must not.

    Raises:
        ProtocolError: the folder is missing or open to others' writing, a name does not fit, a file
            is no public key on a NIST curve, or two nodes have the same key.
    """
    if not folder.is_dir():
        raise ProtocolError(f"{folder} is not a folder; it is to hold the nodes' NAME.pub files.")
    if os.name == "posix" and folder.stat().st_mode & 0o022:
        raise ProtocolError(
            f"Others may write into {folder} and so let nodes join; make it yours alone: "
            f"chmod go-w {folder}."
        )
    found: dict[str, Path] = {}
    owners: dict[bytes, str] = {}
    for path in sorted(folder.glob("*.pub")):
        _check_name(path.stem)
        owner = owners.setdefault(_public_key(path), path.stem)
        if owner != path.stem:
            raise ProtocolError(
                f"{path} is the same key as {owner}.pub; each node needs a key of its own, made "
                "with: flexlora keys."
            )
        found[path.stem] = path
    return found


def fingerprint(path: Path) -> str:
    """A public key in short, as ``ssh-keygen -l`` writes it: the same for no two keys.

    Raises:
        ProtocolError: the file is no public key on a NIST curve.
    """
    blob = base64.b64decode(_public_key(path).split()[1])
    return "SHA256:" + base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip("=")


def check_private(path: Path) -> None:
    """Refuse a private key file that anyone but its owner may read or write.

    Raises:
        ProtocolError: its mode is open to group or others; the sentence says how to close it.
    """
    mode = stat.S_IMODE(path.stat().st_mode)
    if os.name == "posix" and mode & 0o077:
        raise ProtocolError(
            f"The private key {path} is open to others (mode {mode:03o}); make it yours alone: "
            f"chmod 600 {path}."
        )


def _found(path: Path, remedy: str) -> Path:
    if not path.is_file():
        raise ProtocolError(f"{path} is not there; {remedy}.")
    return path


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name) or name.lower() in _TAKEN:
        raise ProtocolError(
            f"'{name}' cannot be a node's name; use 1 to 64 letters, digits, '-', '_' and '.', "
            "no '.' or '-' first, and not 'ca' or 'server'."
        )


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(host))
    except ValueError:
        pass
    # A name of digits alone is a mistyped address: 10.0.0.256, 10.0.0.
    if not _DNS_NAME.fullmatch(host) or host.rpartition(".")[2].isdigit():
        raise ProtocolError(
            f"'{host}' is neither a DNS name nor an IP address; give what nodes connect to, "
            "without a scheme or a port."
        )
    return x509.DNSName(host)


def _make_folder(folder: Path) -> None:
    if not folder.exists():
        folder.mkdir(mode=0o700, parents=True)
    if not folder.is_dir():
        raise ProtocolError(f"{folder} is a file; private keys need a folder.")
    if os.name == "posix" and folder.stat().st_mode & 0o077:
        raise ProtocolError(
            f"Private keys are not put into {folder}, which is open to others; name a new "
            f"folder, or make it yours alone: chmod 700 {folder}."
        )


def _write(path: Path, content: bytes, mode: int) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(content)


def _private_bytes(key: _PrivateKey, form: serialization.PrivateFormat) -> bytes:
    return key.private_bytes(_PEM, form, serialization.NoEncryption())


def _public_bytes(key: ec.EllipticCurvePublicKey) -> bytes:
    return key.public_bytes(_OPENSSH, serialization.PublicFormat.OpenSSH)


def _authority(folder: Path) -> tuple[_PrivateKey, x509.Certificate]:
    key_path, path = folder / "ca.key", folder / "ca.crt"
    if key_path.exists() != path.exists():
        here, missing = (key_path, path) if key_path.exists() else (path, key_path)
        raise ProtocolError(
            f"{here} is there but {missing} is not; put it back, or move {here} away to start "
            "with a new CA, whose ca.crt every node then needs."
        )
    if path.exists():
        key, ca = _private_key(key_path), _certificate(path)
        if ca.public_key() != key.public_key():
            raise ProtocolError(f"{key_path} is not the key of {path}; put the right one there.")
        return key, ca
    key = ec.generate_private_key(ec.SECP256R1())
    # Random, so that two CAs of the same people are told apart.
    name = _subject(f"flexlora CA {os.urandom(4).hex()}")
    ends = datetime.now(UTC) + timedelta(days=_CA_DAYS)
    ca = (
        _builder(name, name, key.public_key(), ends)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage("key_cert_sign", "crl_sign"), critical=True)
        .sign(key, hashes.SHA256())
    )
    _write(key_path, _private_bytes(key, _PKCS8), 0o600)
    _write(path, ca.public_bytes(_PEM), 0o644)
    return key, ca


def _server_certificate(
    key: _PrivateKey, names: list[x509.GeneralName], ca_key: _PrivateKey, ca: x509.Certificate
) -> x509.Certificate:
    ends = min(datetime.now(UTC) + timedelta(days=_SERVER_DAYS), ca.not_valid_after_utc)
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key())
    return (
        _builder(_subject("flexlora server"), ca.subject, key.public_key(), ends)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage("digital_signature"), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(issuer, critical=False)
        .sign(ca_key, hashes.SHA256())
    )


def _subject(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, ends: datetime
) -> x509.CertificateBuilder:
    builder = x509.CertificateBuilder(issuer, subject, key, x509.random_serial_number())
    return (
        builder.not_valid_before(datetime.now(UTC) - _CLOCKS_DIFFER)
        .not_valid_after(ends)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _usage(*uses: str) -> x509.KeyUsage:
    names = "digital_signature content_commitment key_encipherment data_encipherment "
    names += "key_agreement key_cert_sign crl_sign encipher_only decipher_only"
    return x509.KeyUsage(**{name: name in uses for name in names.split()})


def _content(path: Path) -> bytes:
    with path.open("rb") as file:
        content = file.read(_MOST_FILE_BYTES + 1)
    if len(content) > _MOST_FILE_BYTES:
        raise ProtocolError(f"{path} has more than {_MOST_FILE_BYTES} bytes: it is not a key.")
    return content


def _certificate(path: Path) -> x509.Certificate:
    content = _content(path)
    try:
        certificate = x509.load_pem_x509_certificate(content)
    except ValueError as error:
        raise ProtocolError(f"{path} is not a certificate in PEM: {error}.") from error
    if certificate.not_valid_after_utc <= datetime.now(UTC):
        raise ProtocolError(
            f"{path} expired on {certificate.not_valid_after_utc:%Y-%m-%d}; move it away and "
            "make a new one with: flexlora keys."
        )
    return certificate


def _private_key(path: Path, openssh: bool = False) -> _PrivateKey:
    check_private(path)
    content = _content(path)
    load = serialization.load_ssh_private_key if openssh else serialization.load_pem_private_key
    kind = "OpenSSH" if openssh else "PEM"
    try:
        key = load(content, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ProtocolError(f"{path} is not an unencrypted private key in {kind}.") from error
    if not isinstance(key, _PrivateKey):
        raise ProtocolError(f"{path} is not an elliptic-curve key; make one with: flexlora keys.")
    return key


def _public_key(path: Path) -> bytes:
    content = _content(path)
    try:
        key = serialization.load_ssh_public_key(content)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ProtocolError(f"{path} is not an OpenSSH public key: {error}.") from error
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise ProtocolError(f"{path} is not an elliptic-curve key, which Flower asks for.")
    return _public_bytes(key)
