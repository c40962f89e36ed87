"""The certificate authority (CA) of a federation, and the server's certificate.

The server's folder holds ``ca.key``, ``ca.crt``, ``server.key`` and ``server.crt``. The server
runs without ``ca.key``, which may be stored elsewhere until a certificate is renewed. Clients need
``ca.crt``.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from flexlora.deployment.key_files import (
    PEM,
    PrivateKey,
    load_certificate,
    make_private_folder,
    read_certificate,
    read_private_key,
    require,
    write_new,
    write_private_key,
)
from flexlora.errors import ProtocolError
from flexlora.journal import counted
from flexlora.storage import write_atomically

# isort: split
# After key_files, which reports that the package is missing.
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

_CA_DAYS = 3653
_SERVER_DAYS = 730
# A machine whose clock is behind would refuse a certificate made this very minute.
_CLOCKS_DIFFER = timedelta(hours=1)
_DNS_NAME = re.compile(
    r"(?=.{1,253}\Z)(\*\.)?([A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.)*"
    r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
)
_REMAKE = "flexlora keys {} --host NAME"
_RENEW = "flexlora keys {} --renew"
_NOTICE_DAYS = 30
_PKCS8 = serialization.PrivateFormat.PKCS8


@dataclass(frozen=True)
class ServerKeys:
    """The files a server runs with: the CA's certificate, its own, and its private key."""

    ca: Path
    certificate: Path
    key: Path

    @property
    def expires(self) -> datetime:
        """When the server's certificate expires, in UTC; read from its file."""
        return load_certificate(self.certificate).not_valid_after_utc

    def notices(self, now: datetime) -> list[str]:
        """Sentences on what has expired or will within 30 days, with the remedy.

        Raises:
            ProtocolError: a file is no certificate.
            OSError: a file cannot be read.
        """
        renew = _RENEW.format(self.certificate.parent)
        remedies = {
            self.certificate: f"renew it, without stopping anything: {renew}",
            self.ca: f"renew it with: {renew}, and send it to every client before that day",
        }
        sentences = []
        for path, remedy in remedies.items():
            ends = load_certificate(path).not_valid_after_utc
            if ends <= now:
                sentences.append(
                    f"{path} expired on {ends:%Y-%m-%d}: no client can connect; {remedy}"
                )
            elif ends - now <= timedelta(days=_NOTICE_DAYS):
                left = counted((ends - now).days, "day")
                sentences.append(f"{path} expires on {ends:%Y-%m-%d}, in {left}; {remedy}")
        return sentences

    @staticmethod
    def of(folder: Path) -> ServerKeys:
        """The files in a folder that `make_server` filled, checked to belong together.

        Raises:
            ProtocolError: one is missing, unreadable, readable by others, expired, not valid yet
                or of another CA.
        """
        ca_path, path, key_path = (
            require(folder / name, f"make the server's certificates with: {_REMAKE.format(folder)}")
            for name in ("ca.crt", "server.crt", "server.key")
        )
        renew = f"renew it with: {_RENEW.format(folder)}"
        ca, certificate = read_certificate(ca_path, renew), read_certificate(path, renew)
        if certificate.public_key() != read_private_key(key_path).public_key():
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


def make_server(folder: Path, hosts: Sequence[str]) -> ServerKeys:
    """Make a CA and a server certificate for ``hosts``, localhost and 127.0.0.1.

    If the folder has a CA already, only the missing ones of the server's two files are made. So a
    certificate is renewed, and nodes keep their ``ca.crt``. The CA is valid for ten years, a
    certificate for two. Keys are on P-256.

    Raises:
        ProtocolError: a file would be overwritten, the CA is half there or expired, the folder is
            open to others, or a host is neither a DNS name nor an IP address.
    """
    names = [_host(host) for host in dict.fromkeys([*hosts, "localhost", "127.0.0.1"])]
    make_private_folder(folder)
    key, certificate = folder / "server.key", folder / "server.crt"
    if certificate.exists():
        raise ProtocolError(
            f"{certificate} is there already and is not overwritten; to renew it with the same "
            f"CA: {_RENEW.format(folder)}; to make one for other names, move it away first."
        )
    ca_key, ca = _authority(folder)
    if key.exists():
        server_key = read_private_key(key)
    else:
        server_key = ec.generate_private_key(ec.SECP256R1())
        write_private_key(key, server_key, _PKCS8)
    signed = _server_certificate(server_key, names, ca_key, ca)
    write_new(certificate, signed.public_bytes(PEM), 0o644)
    return ServerKeys.of(folder)


@dataclass(frozen=True)
class Renewed:
    """What `renew_server` wrote; ``ca_expired`` is the end of the old CA if that was renewed."""

    keys: ServerKeys
    ca_expired: datetime | None


def renew_server(folder: Path, hosts: Sequence[str] = ()) -> Renewed:
    """Renew the server's certificate, for the names it has and ``hosts``; a running gate takes it.

    The key stays, so the one file that changes fits the other at any moment. A CA that ends within
    two years is renewed too, with its key and its name: clients then accept the server by the old
    ``ca.crt`` as long as that is valid, and by the new one.

    Raises:
        ProtocolError: a file is missing or is not what its name says, such as the CA's key when
            that is stored elsewhere, or a host is neither a DNS name nor an IP address.
    """
    path, key_path, ca_path, ca_key_path = (
        folder / name for name in ("server.crt", "server.key", "ca.crt", "ca.key")
    )
    remake = f"make the server's certificates with: {_REMAKE.format(folder)}"
    for file in (path, key_path, ca_path):
        require(file, remake)
    require(ca_key_path, "put the CA's key back there to renew, and away again afterwards")
    make_private_folder(folder)
    old, ca, ca_key = load_certificate(path), load_certificate(ca_path), _ca_key(folder)
    names = list(dict.fromkeys([*_names(old), *map(_host, hosts)]))
    ca_expired = None
    if ca.not_valid_after_utc - datetime.now(UTC) < timedelta(days=_SERVER_DAYS):
        ca_expired, ca = ca.not_valid_after_utc, _ca_certificate(ca_key, ca.subject)
        write_atomically(ca_path, ca.public_bytes(PEM), 0o644)
    signed = _server_certificate(read_private_key(key_path), names, ca_key, ca)
    write_atomically(path, signed.public_bytes(PEM), 0o644)
    return Renewed(ServerKeys.of(folder), ca_expired)


def make_internal(folder: Path) -> ServerKeys:
    """Make new files for a server that only this machine reaches, over what is in ``folder``.

    They have a CA of their own, whose key is not kept: nothing else can be signed with it.
    """
    shutil.rmtree(folder, ignore_errors=True)
    keys = make_server(folder, [])
    (folder / "ca.key").unlink()
    return keys


def _names(certificate: x509.Certificate) -> list[x509.GeneralName]:
    try:
        extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except (x509.ExtensionNotFound, ValueError):
        return []
    return list(extension.value)


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(host))
    except ValueError:
        pass
    # A name of only digits is a mistyped address: 10.0.0.256, 10.0.0.
    if not _DNS_NAME.fullmatch(host) or host.rpartition(".")[2].isdigit():
        raise ProtocolError(
            f"'{host}' is neither a DNS name nor an IP address; give what nodes connect to, "
            "without a scheme or a port."
        )
    return x509.DNSName(host)


def _authority(folder: Path) -> tuple[PrivateKey, x509.Certificate]:
    key_path, path = folder / "ca.key", folder / "ca.crt"
    if key_path.exists() != path.exists():
        present, missing = (key_path, path) if key_path.exists() else (path, key_path)
        raise ProtocolError(
            f"{present} is there but {missing} is not; put it back, or move {present} away to "
            "start with a new CA, whose ca.crt every node then needs."
        )
    if path.exists():
        renew = f"renew it with: {_RENEW.format(folder)}"
        return _ca_key(folder), read_certificate(path, renew)
    key = ec.generate_private_key(ec.SECP256R1())
    # Random, so that the names of two CAs of the same owner differ.
    ca = _ca_certificate(key, _subject(f"flexlora CA {os.urandom(4).hex()}"))
    write_private_key(key_path, key, _PKCS8)
    write_new(path, ca.public_bytes(PEM), 0o644)
    return key, ca


def _ca_key(folder: Path) -> PrivateKey:
    key_path, path = folder / "ca.key", folder / "ca.crt"
    key = read_private_key(key_path)
    if load_certificate(path).public_key() != key.public_key():
        raise ProtocolError(f"{key_path} is not the key of {path}; put the right one there.")
    return key


def _ca_certificate(key: PrivateKey, name: x509.Name) -> x509.Certificate:
    ends = datetime.now(UTC) + timedelta(days=_CA_DAYS)
    return (
        _builder(name, name, key.public_key(), ends)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage("key_cert_sign", "crl_sign"), critical=True)
        .sign(key, hashes.SHA256())
    )


def _server_certificate(
    key: PrivateKey, names: list[x509.GeneralName], ca_key: PrivateKey, ca: x509.Certificate
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
