"""Files of keys and certificates: read with checks, written so that others cannot read them."""

from __future__ import annotations

import os
import stat
from datetime import UTC, datetime
from pathlib import Path

from flexlora.errors import ProtocolError

try:
    from cryptography import x509
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec
except ImportError as error:
    raise ProtocolError(
        "Certificates and node keys need the package 'cryptography'; install it with: "
        "pip install 'flexlora[flower]'."
    ) from error

PrivateKey = ec.EllipticCurvePrivateKey
PEM, OPENSSH = serialization.Encoding.PEM, serialization.Encoding.OpenSSH
_MOST_FILE_BYTES = 65536


def check_private(path: Path) -> None:
    """Refuse a private key file that anyone but its owner may read or write.

    Raises:
        ProtocolError: its mode gives permissions to group or others.
    """
    mode = stat.S_IMODE(path.stat().st_mode)
    if os.name == "posix" and mode & 0o077:
        raise ProtocolError(
            f"The private key {path} is open to other users (mode {mode:03o}); run: "
            f"chmod 600 {path}"
        )


def make_private_folder(folder: Path) -> None:
    """Make a folder that only its owner can enter.

    Raises:
        ProtocolError: it is a file, or a folder that others may enter.
    """
    if not folder.exists():
        try:
            folder.mkdir(mode=0o700, parents=True)
        except OSError as error:
            raise ProtocolError(
                f"The folder {folder} cannot be made: {error.strerror}; give another one for the "
                f"private keys."
            ) from error
    if not folder.is_dir():
        raise ProtocolError(f"{folder} is a file; give a folder for the private keys.")
    if os.name == "posix" and folder.stat().st_mode & 0o077:
        raise ProtocolError(
            f"Private keys are not written into {folder}, which is open to other users; give a "
            f"new folder, or run: chmod 700 {folder}"
        )


def write_new(path: Path, content: bytes, mode: int) -> None:
    """Write a file that does not exist yet, with these permissions from the start."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(content)


def write_private_key(path: Path, key: PrivateKey, form: serialization.PrivateFormat) -> None:
    """Write an unencrypted private key that only its owner can read."""
    write_new(path, key.private_bytes(PEM, form, serialization.NoEncryption()), 0o600)


def load_certificate(path: Path) -> x509.Certificate:
    """A certificate from a PEM file, whatever its dates.

    Raises:
        ProtocolError: the file is no certificate.
    """
    content = _content(path)
    try:
        return x509.load_pem_x509_certificate(content)
    except ValueError as error:
        raise ProtocolError(
            f"{path} is not a certificate in PEM; give the one that flexlora keys --host wrote."
        ) from error


def read_certificate(path: Path, remedy: str) -> x509.Certificate:
    """A certificate from a PEM file that is valid now; ``remedy`` is for one that has expired.

    Raises:
        ProtocolError: the file is no certificate, it has expired, or it is not valid yet.
    """
    certificate, now = load_certificate(path), datetime.now(UTC)
    if certificate.not_valid_after_utc <= now:
        raise ProtocolError(
            f"{path} expired on {certificate.not_valid_after_utc:%Y-%m-%d}; {remedy}."
        )
    if certificate.not_valid_before_utc > now:
        raise ProtocolError(
            f"{path} is valid only from {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC, and "
            f"this machine's clock says {now:%Y-%m-%d %H:%M} UTC: set the clock, or wait."
        )
    return certificate


def read_private_key(path: Path, openssh: bool = False) -> PrivateKey:
    """A private key from a PEM or OpenSSH file.

    Raises:
        ProtocolError: other users may read the file, or it is no elliptic-curve key.
    """
    check_private(path)
    content = _content(path)
    load = serialization.load_ssh_private_key if openssh else serialization.load_pem_private_key
    form = "OpenSSH" if openssh else "PEM"
    try:
        key = load(content, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ProtocolError(f"{path} is not an unencrypted private key in {form}.") from error
    if not isinstance(key, PrivateKey):
        raise ProtocolError(f"{path} is not an elliptic-curve key; make one with: flexlora keys.")
    return key


def read_public_key(path: Path) -> bytes:
    """A public key from an OpenSSH file, in OpenSSH's form without the comment.

    Raises:
        ProtocolError: the file is no public key on a NIST curve.
    """
    content = _content(path)
    try:
        key = serialization.load_ssh_public_key(content)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ProtocolError(
            f"{path} is not an OpenSSH public key; give the NAME.pub of flexlora keys --node."
        ) from error
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise ProtocolError(f"{path} is not an elliptic-curve key, which Flower requires.")
    return public_bytes(key)


def public_bytes(key: ec.EllipticCurvePublicKey) -> bytes:
    """A public key in OpenSSH's form."""
    return key.public_bytes(OPENSSH, serialization.PublicFormat.OpenSSH)


def require(path: Path, remedy: str) -> Path:
    """The path. Raises ProtocolError, with the remedy, if there is no such file."""
    if not path.is_file():
        raise ProtocolError(f"{path} is not there; {remedy}.")
    return path


def _content(path: Path) -> bytes:
    with path.open("rb") as file:
        content = file.read(_MOST_FILE_BYTES + 1)
    if len(content) > _MOST_FILE_BYTES:
        raise ProtocolError(f"{path} has more than {_MOST_FILE_BYTES} bytes: it is not a key.")
    return content
