"""The key pair of each node, as Flower reads them: one client, one key.

A node's folder holds ``ca.crt``, which the server's owner sends, ``NAME.key``, which stays there,
and ``NAME.pub``, which the node's owner sends to the server's owner. Private files (``*.key``) are
written with mode 0600, and refused if other users may read them.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from flexlora.deployment.key_files import (
    make_private_folder,
    public_bytes,
    read_certificate,
    read_private_key,
    read_public_key,
    require,
    write_new,
    write_private_key,
)
from flexlora.errors import ProtocolError
from flexlora.storage import write_atomically

# isort: split
# After key_files, which reports that the package is missing.
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

NODES = "nodes"
"""Folder of the nodes' public keys, in the folder of the server's keys."""
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")
# Their keys would have the names of the server's files if one folder holds everything.
_RESERVED = ("ca", "server")


@dataclass(frozen=True)
class NodeKey:
    """The files a node runs with: the server's CA certificate and the node's private key."""

    name: str
    key: Path
    ca: Path

    @staticmethod
    def of(folder: Path, name: str | None = None) -> NodeKey:
        """The files in a node's folder; without ``name`` there must be one node key in it.

        Raises:
            ProtocolError: a file is missing, unreadable or readable by others, or several fit.
        """
        if name is not None:
            _check_name(name)
        files = [path for path in sorted(folder.glob("*.key")) if path.stem not in _RESERVED]
        fit = [path for path in files if name in (None, path.stem)]
        if not fit:
            raise ProtocolError(
                f"There is no {name or 'NAME'}.key in {folder}; make the node's keys with: "
                f"flexlora keys {folder} --node {name or 'NAME'}."
            )
        if len(fit) > 1:
            names = ", ".join(path.stem for path in fit)
            raise ProtocolError(
                f"{folder} holds the keys of several nodes ({names}); choose one with --name."
            )
        ca = require(
            folder / "ca.crt",
            "get the server's ca.crt from its owner and put it there",
        )
        read_certificate(ca, "get the renewed ca.crt from the server's owner and put it there")
        read_private_key(fit[0], openssh=True)
        return NodeKey(fit[0].stem, fit[0], ca)


def make_node(folder: Path, name: str) -> Path:
    """Make a node's ``NAME.key`` and ``NAME.pub``; returns the path of the public one.

    Both are OpenSSH files on P-384: the private one is for ``flower-supernode
    --auth-supernode-private-key``, the public one for ``flwr supernode register``.

    Raises:
        ProtocolError: the name cannot be a file's name, one of the two files exists, or the folder
            is open to other users.
    """
    _check_name(name)
    make_private_folder(folder)
    key, public = folder / f"{name}.key", folder / f"{name}.pub"
    for path in (key, public):
        if path.exists():
            raise ProtocolError(
                f"{path} is there already and is not overwritten; choose another name, or move "
                "it away and have the new public key registered."
            )
    pair = ec.generate_private_key(ec.SECP384R1())
    write_private_key(key, pair, serialization.PrivateFormat.OpenSSH)
    write_new(public, public_bytes(pair.public_key()) + f" {name}\n".encode(), 0o644)
    return public


def admit(folder: Path, public: Path) -> str:
    """Admit the client of a public key ``NAME.pub`` to the server with keys in ``folder``.

    Returns the client's name.

    Raises:
        ProtocolError: the folder is not that of a server's keys, the file is no public key of a
            client, another client has the key, or the name has another key.
    """
    nodes = folder / NODES
    if not nodes.is_dir():
        raise ProtocolError(
            f"{folder} does not hold a server's keys; make them first: flexlora keys {folder} "
            "--host NAME."
        )
    require(public, "give the file NAME.pub that the client's owner has sent")
    name, key = public.stem, read_public_key(public)
    _check_name(name)
    if public.suffix != ".pub":
        raise ProtocolError(f"{public} is not called NAME.pub, with the name of its client.")
    for other, path in node_keys(nodes).items():
        is_same = read_public_key(path) == key
        if is_same != (other == name):
            raise ProtocolError(
                f"{path} is the key of client {other}, "
                + (
                    f"the same as {public}; each client needs a key of its own."
                    if is_same
                    else f"another than {public}; remove it first if that client has a new one."
                )
            )
    write_atomically(nodes / f"{name}.pub", key + f" {name}\n".encode())
    return name


def node_keys(folder: Path) -> dict[str, Path]:
    """The public keys in a folder by node name, each ``NAME.pub`` checked to be one.

    A user who may write into the folder can authorise nodes, so only its owner may.

    Raises:
        ProtocolError: the folder is missing, other users may write into it, a file's name cannot
            be a node's, a file is no public key on a NIST curve, or two nodes have the same key.
    """
    if not folder.is_dir():
        raise ProtocolError(f"{folder} is not a folder; make it, for the nodes' NAME.pub files.")
    if os.name == "posix" and folder.stat().st_mode & 0o022:
        raise ProtocolError(
            f"Other users may write into {folder} and so authorise nodes; run: chmod go-w {folder}"
        )
    files: dict[str, Path] = {}
    owners: dict[bytes, str] = {}
    for path in sorted(folder.glob("*.pub")):
        _check_name(path.stem)
        owner = owners.setdefault(read_public_key(path), path.stem)
        if owner != path.stem:
            raise ProtocolError(
                f"{path} is the same key as {owner}.pub; each node needs a key of its own, made "
                "with: flexlora keys."
            )
        files[path.stem] = path
    return files


def fingerprint_of(key: ec.EllipticCurvePublicKey) -> str:
    """The fingerprint of a public key, as ``fingerprint`` gives that of a file."""
    return _fingerprint(public_bytes(key))


def fingerprint(path: Path) -> str:
    """The SHA-256 fingerprint of a public key, as ``ssh-keygen -l`` prints it.

    Raises:
        ProtocolError: the file is no public key on a NIST curve.
    """
    return _fingerprint(read_public_key(path))


def fingerprint_of_private(path: Path) -> str:
    """The fingerprint of the public key that belongs to a private key's file.

    Raises:
        ProtocolError: the file cannot be read, or other users may read it.
    """
    return fingerprint_of(read_private_key(path, openssh=True).public_key())


def _fingerprint(public: bytes) -> str:
    blob = base64.b64decode(public.split()[1])
    return "SHA256:" + base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip("=")


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name) or name.lower() in _RESERVED:
        raise ProtocolError(
            f"'{name}' cannot be a node's name; use 1 to 64 letters, digits, '-', '_' and '.', "
            "no '.' or '-' first, and not 'ca' or 'server'."
        )
