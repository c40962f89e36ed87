"""Network addresses as people write them: HOST:PORT, and [HOST]:PORT for IPv6."""

from __future__ import annotations

import socket
from ipaddress import ip_address

from flexlora.errors import ConfigError

_MOST_PORT = 2**16 - 1


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a host: localhost, 127.0.0.0/8 or ::1."""
    try:
        return ip_address(without_brackets(host)).is_loopback
    except ValueError:
        return host == "localhost"


def without_brackets(host: str) -> str:
    """A host without the brackets of an IPv6 address in a URL."""
    return host.removeprefix("[").removesuffix("]")


def split(text: str) -> tuple[str, int] | None:
    """Host and port of HOST:PORT, without brackets; None if the text has another form."""
    host, _, port = text.rpartition(":")
    # isdecimal also accepts digits of other scripts.
    if not host or "/" in host or not (port.isascii() and port.isdecimal()):
        return None
    if int(port) > _MOST_PORT:
        return None
    return without_brackets(host), int(port)


def parse(text: str, option: str, example: str, free: bool = True) -> tuple[str, int]:
    """Host and port of HOST:PORT; ``free`` allows port 0, which takes any free port.

    ``option`` and ``example`` are for the sentence of the error.

    Raises:
        ConfigError: the text has another form.
    """
    address = split(text)
    if address is None or not (free or address[1]):
        raise ConfigError(f"{option} takes HOST:PORT such as {example}, not {text!r}.")
    return address


def joined(host: str, port: int) -> str:
    """HOST:PORT, with brackets around an IPv6 address."""
    return f"{in_brackets(host)}:{port}"


def in_brackets(host: str) -> str:
    """A host as a URL has it: with brackets around an IPv6 address."""
    return f"[{host}]" if ":" in host else host


def is_free(host: str, port: int) -> bool:
    """Whether this machine can listen there now."""
    try:
        listener(host, port).close()
    except OSError:
        return False
    return True


def listener(host: str, port: int, backlog: int | None = None) -> socket.socket:
    """A TCP socket that listens there, IPv4 or IPv6 by the form of the host.

    Raises:
        OSError: the address is not this machine's, or is in use.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=backlog)
